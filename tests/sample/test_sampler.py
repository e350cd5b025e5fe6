"""Slots that are refilled, against drawing one text at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cfs.errors import UserError
from cfs.model import Decoder, build_model, load_model
from cfs.model.attention import Span
from cfs.model.config import parse_config
from cfs.sample import sampler
from cfs.sample.sample import Request, Sample, SamplingSettings
from cfs.sample.sampler import Usage, choose_num_slots, generate
from cfs.sample.slots import Slots
from tests.conftest import tiny_config, tiny_model

EOS, FEW = 0, 12  # of few tokens end-of-text is drawn often


def collect(
    model: Decoder,
    prompts: list[list[int]],
    settings: SamplingSettings,
    num_slots: int,
    num_tokens: int = 97,
) -> list[Sample]:
    requests = [Request(i, p) for i, p in enumerate(prompts)]
    longest = max(map(len, prompts))
    samples = list(generate(model, requests, settings, EOS, num_tokens, num_slots, longest))
    assert sorted(s.index for s in samples) == list(range(len(prompts))), "none lost or doubled"
    return sorted(samples, key=lambda s: s.index)


@torch.no_grad()
def one_by_one(
    model: Decoder, prompt: list[int], index: int, settings: SamplingSettings
) -> list[int]:
    """The oracle: no cache, no slots, no batch."""
    from cfs.sample.sampling import draw, uniforms

    u = torch.from_numpy(uniforms(settings.seed, index, settings.max_tokens))
    ids = list(prompt)
    for t in range(settings.max_tokens):
        logits = model(torch.tensor([ids]))[:, -1]
        ids.append(int(draw(logits, u[t : t + 1], settings.temperature, settings.top_p, FEW)[0]))
        if ids[-1] == EOS:
            break
    return ids


PROMPTS = [[EOS]] * 40
MIXED = [[EOS, *range(1, 1 + i % 7)] for i in range(40)]
MANY = MIXED * 6


@pytest.mark.parametrize(
    ("prompts", "num_slots"),
    [(PROMPTS, 1), (PROMPTS, 7), (PROMPTS, 64), (MIXED, 1), (MIXED, 7), (MANY, 100)],
)
def test_samples_do_not_depend_on_the_batch(prompts: list[list[int]], num_slots: int) -> None:
    """Catches a refill that leaks the slot's last text, a shared counter, a wrong prefill."""
    model = tiny_model("llama", num_key_value_heads=2, vocab_size=FEW)
    settings = SamplingSettings(max_tokens=24, top_p=0.9, seed=5)
    samples = collect(model, prompts, settings, num_slots, num_tokens=FEW)
    lengths = {len(s.logprob_model) for s in samples}
    assert len(lengths) > 5, "texts of one length would not exercise the refill"
    for sample, prompt in zip(samples, prompts, strict=True):
        expected = one_by_one(model, prompt, sample.index, settings)
        assert sample.input_ids.tolist() == expected


def test_logprobs_equal_a_fresh_forward_pass() -> None:
    """Catches log-probabilities shifted by one, truncated, tempered or of another row."""
    model = tiny_model("olmo")
    settings = SamplingSettings(max_tokens=24, temperature=0.7, top_p=0.8, seed=1)
    for sample in collect(model, MIXED, settings, 8):
        ids = torch.from_numpy(sample.input_ids).long()[None]
        with torch.no_grad():
            logits = model(ids)[0, sample.num_prompt_tokens - 1 : -1]
        drawn = ids[0, sample.num_prompt_tokens :, None]
        expected = logits.log_softmax(-1).gather(-1, drawn)[:, 0]
        np.testing.assert_allclose(sample.logprob_model, expected.numpy(), atol=1e-4)
        tempered = (logits / 0.7).softmax(-1)
        assert (
            sample.logprob_sampler >= tempered.log().gather(-1, drawn)[:, 0].numpy() - 1e-4
        ).all()


def test_topk_is_the_head_of_the_full_law() -> None:
    """Catches top-k of another position or row, or of the truncated law, slots moving included."""
    model = tiny_model("llama")
    settings = SamplingSettings(max_tokens=24, temperature=0.7, top_p=0.8, seed=1)
    requests = [Request(i, prompt) for i, prompt in enumerate(MANY)]
    samples = list(generate(model, requests, settings, EOS, FEW, 70, 7, store_topk=5))
    assert len(samples) == len(MANY)
    for sample in samples[::5]:
        ids = torch.from_numpy(sample.input_ids).long()[None]
        with torch.no_grad():
            law = model(ids)[0, sample.num_prompt_tokens - 1 : -1].log_softmax(-1)
        values, tokens = law.topk(5)
        assert sample.topk is not None
        assert sample.topk.ids.shape == (len(sample.logprob_model), 5)
        assert (sample.topk.ids == tokens.numpy()).all()
        np.testing.assert_allclose(sample.topk.logprobs, values.numpy(), atol=1e-4)
        rest = 1 - values.exp().sum(-1).numpy()
        np.testing.assert_allclose(sample.topk.rest_mass, rest, atol=1e-5)


def test_slots_are_kept_at_work() -> None:
    """Catches slots that wait for a batch to end: at least 95 % of slot-steps make a token."""
    model = tiny_model(vocab_size=FEW)
    for prompts in ([[EOS]] * 400, MIXED * 10):
        usage = Usage()
        requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
        settings = SamplingSettings(max_tokens=100, top_p=1.0)
        samples = list(generate(model, requests, settings, EOS, FEW, 64, 7, usage=usage))
        tokens = sum(len(sample.logprob_model) for sample in samples)
        assert usage.tokens == tokens
        assert usage.tokens >= 0.95 * usage.slot_steps


def test_requests_are_taken_a_few_at_a_time() -> None:
    """Catches a sampler whose memory grows with the number of samples asked for."""
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            yield Request(taken, [EOS])
            taken += 1

    model = tiny_model(vocab_size=FEW)
    samples = generate(model, endless(), SamplingSettings(max_tokens=9), EOS, FEW, 16)
    for _ in range(1000):
        next(samples)
    assert taken < 1000 + 16 + 1024


def test_the_device_step_asks_the_host_nothing() -> None:
    """Catches a read of a tensor's value in the step, which would break the CUDA graph of it: a
    meta tensor has no values to read. Takes the bisection, as CUDA does."""
    model = build_model(parse_config(tiny_config("llama")), device="meta").requires_grad_(False)
    settings = SamplingSettings(max_tokens=8)
    slots = Slots(model, settings, EOS, 90, 4, 12, store_topk=3, attention="auto")
    flags = slots.device_step([Span(slice(0, 4), 5)])
    assert flags.shape == (2, 4)


def test_automatic_slots_follow_vocabulary_and_need() -> None:
    """Catches slots without a sample, and logits of a step that outgrow a processor's cache."""
    model = tiny_model()
    assert choose_num_slots(model, 100, num_samples=10) == 10
    assert choose_num_slots(model, 100, num_samples=10**6) == 256
    large = tiny_model(vocab_size=50_304)
    assert choose_num_slots(large, 100, num_samples=10**6) == 128


def test_logprobs_equal_those_of_transformers(tinyworld: Path) -> None:
    """Catches an error that sampler and forward pass share."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tinyworld, dtype=torch.float32)
    model = load_model(tinyworld)
    settings = SamplingSettings(max_tokens=60, seed=3)
    for sample in collect(model, [[EOS]] * 12, settings, 5, num_tokens=1000):
        ids = torch.from_numpy(sample.input_ids).long()[None]
        with torch.no_grad():
            law = reference(ids).logits[0, :-1].log_softmax(-1)
        expected = law.gather(-1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(sample.logprob_model, expected.numpy(), atol=1e-4)


def test_stopping() -> None:
    """Catches a seed that stops its own sample, a lost stop token, an overlong text."""
    model = tiny_model()
    settings = SamplingSettings(max_tokens=16, top_p=1.0, seed=2)
    samples = collect(model, [[EOS]] * 300, settings, 32)
    for sample in samples:
        generated = sample.input_ids[1:]
        assert sample.input_ids[0] == EOS
        assert EOS not in generated[:-1], "nothing follows end-of-text"
        assert (generated[-1] == EOS) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(generated) == 16
        assert len(generated) == len(sample.logprob_model) == len(sample.logprob_sampler)
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_first_tokens_follow_the_models_law() -> None:
    """Catches a bias of the whole path: the lone seed token's distribution, over many samples."""
    model = tiny_model()
    settings = SamplingSettings(max_tokens=1, top_p=1.0, seed=4)
    samples = collect(model, [[EOS]] * 20_000, settings, 512)
    counts = np.bincount([s.input_ids[1] for s in samples], minlength=97)
    with torch.no_grad():
        law = model(torch.tensor([[EOS]]))[0, 0].double().softmax(-1).numpy()
    error = np.abs(counts / 20_000 - law) / np.sqrt(law * (1 - law) / 20_000)
    assert error.max() < 4.5


def test_padding_vocabulary_is_never_drawn() -> None:
    """Catches OLMo's 24 rows beyond its tokenizer turning up as text."""
    model = tiny_model()
    settings = SamplingSettings(max_tokens=12, temperature=3.0, top_p=1.0)
    samples = collect(model, [[EOS]] * 100, settings, 16, num_tokens=60)
    assert max(s.input_ids.max() for s in samples) < 60


def test_too_long_for_the_context_is_refused() -> None:
    """Catches sampling beyond the positions that the model knows."""
    with pytest.raises(UserError, match="context of 128"):
        collect(tiny_model(), [[EOS]], SamplingSettings(max_tokens=128), 1)


def test_logits_that_are_not_finite_are_named() -> None:
    """Catches a corpus of noise from a broken checkpoint."""
    model = tiny_model()
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"sample \d+, position \d+"):
        collect(model, [[EOS]] * 4, SamplingSettings(max_tokens=4), 2)


def test_a_logit_of_minus_infinity_stops_too() -> None:
    """Catches a broken row of the head whose token is never drawn."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("-inf")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"sample \d+, position \d+"):
        collect(model, [[EOS]] * 4, SamplingSettings(max_tokens=4), 2)


def test_slots_beyond_the_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an allocator's traceback where the number of slots is the user's to mend."""

    def refuse(*_: object) -> Slots:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(sampler, "Slots", refuse)
    with pytest.raises(UserError, match="--batch-size 2: "):
        collect(tiny_model(), [[EOS]] * 4, SamplingSettings(max_tokens=4), 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
)
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        SamplingSettings(**({"max_tokens": 4} | bad))  # type: ignore[arg-type]


def test_tinyworld_samples_are_batch_invariant(tinyworld: Path) -> None:
    """The same on the shipped model, where texts look like texts. As a sample does not depend on
    how many are drawn, the slower ways draw the first ones only; `bench/sampler.py --only exact`
    draws all of them every way."""
    model = load_model(tinyworld)
    settings = SamplingSettings(max_tokens=100, seed=9)

    def texts(count: int, slots: int) -> dict[int, list[int]]:
        requests = [Request(i, [0]) for i in range(count)]
        samples = generate(model, requests, settings, 0, 1000, slots)
        return {s.index: s.input_ids.tolist() for s in samples}

    expected = texts(2000, 256)
    for count, slots in ((40, 1), (300, 7), (2000, 64)):
        differing = [i for i, ids in texts(count, slots).items() if ids != expected[i]]
        assert not differing, f"{slots} slots"
