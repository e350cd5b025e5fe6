"""The KL estimate, against a model whose KL is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cfs.data.formats import make_example
from cfs.model import Decoder
from cfs.sample.sampler import Request, SamplingSettings, generate
from cfs.train.kl import HeldOutSamples, estimate_kl, sequence_logprobs
from tests.conftest import ALONE, tiny_model

EOS, VOCABULARY, MAX_TOKENS = 0, 5, 3


def small(seed: int) -> Decoder:
    return tiny_model("olmo", seed=seed, vocab_size=VOCABULARY, max_position_embeddings=8)


@torch.no_grad()
def exact_kl(base: Decoder, tuned: Decoder) -> float:
    """Sum over every string of at most MAX_TOKENS tokens, end-of-text closing the shorter ones."""
    total = 0.0
    stack: list[tuple[list[int], float, float]] = [([EOS], 0.0, 0.0)]
    while stack:
        ids, base_logprob, tuned_logprob = stack.pop()
        if len(ids) > 1 and (ids[-1] == EOS or len(ids) == 1 + MAX_TOKENS):
            total += np.exp(base_logprob) * (base_logprob - tuned_logprob)
            continue
        steps = [m(torch.tensor([ids]))[0, -1].double().log_softmax(-1) for m in (base, tuned)]
        for token in range(VOCABULARY):
            stack.append(
                (
                    [*ids, token],
                    base_logprob + float(steps[0][token]),
                    tuned_logprob + float(steps[1][token]),
                )
            )
    return total


def held_out(base: Decoder, num_samples: int, seed: int, top_p: float = 1.0) -> HeldOutSamples:
    settings = SamplingSettings(MAX_TOKENS, temperature=1.0, top_p=top_p, seed=seed)
    requests = (Request(i, [EOS]) for i in range(num_samples))
    samples = list(generate(base, requests, settings, EOS, VOCABULARY, 256))
    return HeldOutSamples(
        [make_example(s.input_ids, 1) for s in samples],
        np.array([s.logprob_model.sum(dtype=np.float64) for s in samples]),
    )


def test_estimate_is_unbiased_and_its_error_honest() -> None:
    """Catches a KL of the wrong direction, per token, or of the truncated law."""
    base, tuned = small(1), small(2)
    truth = exact_kl(base, tuned)
    assert truth > 0.05
    estimates = [estimate_kl(tuned, held_out(base, 1000, seed), 4096, ALONE) for seed in range(20)]
    mean = np.mean([e.nats for e in estimates])
    se_of_mean = np.mean([e.se for e in estimates]) / np.sqrt(len(estimates))
    assert abs(mean - truth) < 3.5 * se_of_mean
    spread = np.std([e.nats for e in estimates], ddof=1)
    assert spread == pytest.approx(np.mean([e.se for e in estimates]), rel=0.5)


def test_a_model_is_no_distance_from_itself() -> None:
    """Catches log-probabilities of the sampler and of training that disagree."""
    base = small(1)
    kl = estimate_kl(base, held_out(base, 500, 0), 64, ALONE)
    assert abs(kl.nats) < 1e-5
    assert kl.se < 1e-5


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 4096])
@torch.no_grad()
def test_each_sequence_gets_the_sum_over_its_own_targets(max_tokens: int) -> None:
    """Catches log-probabilities credited to another document of the packed row."""
    model = small(1)
    examples = held_out(small(2), 40, 0).examples
    ids, sums = sequence_logprobs(model, examples, max_tokens, ALONE)
    assert sorted(ids) == list(range(40))
    assert sums.dtype == np.float64
    for i, total in zip(ids, sums, strict=True):
        tokens = torch.from_numpy(examples[i].input_ids)
        logprobs = model(tokens[None])[0, :-1].log_softmax(-1)
        alone = logprobs.gather(-1, tokens[1:, None]).sum()
        assert total == pytest.approx(float(alone), abs=1e-5)


def test_truncated_samples_are_biased() -> None:
    """Why the held-out samples are drawn at top-p 1: a nucleus of one half misses the KL."""
    base, tuned = small(1), small(2)
    kl = estimate_kl(tuned, held_out(base, 5000, 0, top_p=0.5), 4096, ALONE)
    assert abs(kl.nats - exact_kl(base, tuned)) > 5 * kl.se
