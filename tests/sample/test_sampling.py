"""The drawn law, against the exact one in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cfs.sample.sampling import draw, inverse_cdf, top_logprobs, uniforms


def exact_law(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """q (V,) float64, straight from the definition."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = np.zeros(len(p), dtype=bool)
    total = 0.0
    for token in np.argsort(-p, kind="stable"):
        if total >= top_p:
            break
        kept[token] = True
        total += p[token]
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(1.0, 1.0), (1.0, 0.95), (0.6, 0.95), (1.2, 0.5), (0.6, 1.0), (2.0, 0.8), (1.0, 0.01)],
)
def test_frequencies_follow_the_exact_law(temperature: float, top_p: float) -> None:
    """Catches a wrong temperature, a nucleus cut in the wrong place, a biased draw: 1e6 draws."""
    num_draws, vocabulary, num_tokens = 1_000_000, 40, 37
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    numbers = np.random.default_rng(5)
    counts = np.zeros(num_tokens)
    law = exact_law(logits.numpy()[:num_tokens], temperature, top_p)
    for _ in range(10):
        u = torch.from_numpy(numbers.random(num_draws // 10))
        token, _, logprob = draw(
            logits.repeat(len(u), 1), u, temperature, top_p, num_tokens=num_tokens
        )
        np.testing.assert_allclose(logprob.numpy(), np.log(law[token.numpy()]), atol=1e-5)
        drawn = np.bincount(token.numpy(), minlength=num_tokens)
        assert len(drawn) == num_tokens, "padding of the vocabulary is never drawn"
        counts += drawn
    assert not counts[law == 0].any(), "tokens outside the nucleus are never drawn"
    expected = law[law > 0] * num_draws
    if len(expected) > 1:
        rare = expected < 5  # pool, as the test's approximation needs
        observed = counts[law > 0]
        if rare.any():
            expected = np.append(expected[~rare], expected[rare].sum())
            observed = np.append(observed[~rare], observed[rare].sum())
        p_value = stats.chisquare(observed, expected).pvalue
        print(f"temperature {temperature}, top-p {top_p}: p = {p_value:.3f}")
        assert p_value > 0.001


def test_inverse_cdf_edges() -> None:
    """Catches drawing a token of weight zero at either end of [0, 1)."""
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)
    u = torch.tensor([0.0, 0.2499999, 0.25, 1 - 1e-16], dtype=torch.float64)
    token, total = inverse_cdf(weights, u)
    assert token.tolist() == [1, 1, 3, 3]
    assert total.tolist() == [1.0] * 4


@pytest.mark.parametrize("vocabulary", [5, 128, 129, 1019])
def test_inverse_cdf_equals_one_cumulative_sum(vocabulary: int) -> None:
    """Catches an offset at the edges of the blocks that are summed first, or a lost last one."""
    num_draws = 3000
    weights = torch.rand(1, vocabulary) * (torch.rand(1, vocabulary) < 0.5)
    weights[0, vocabulary // 2] = 1.0
    u = torch.rand(num_draws, dtype=torch.float64)
    token, _ = inverse_cdf(weights.expand(num_draws, -1), u)
    cdf = weights[0].double().cumsum(0)
    expected = torch.searchsorted(cdf, u * cdf[-1], right=True)
    near = (cdf[None] / cdf[-1] - u[:, None]).abs().amin(1) < 1e-6
    assert ((token == expected) | near).all()
    assert (weights[0, token] > 0).all()


def test_top_logprobs_are_the_head_of_the_full_law() -> None:
    """Catches a head of the truncated or tempered law, and a rest that does not add up."""
    logits = torch.randn(4, 200) * 3
    ids, logprobs, rest = top_logprobs(logits, 10)
    law = logits.double().log_softmax(-1)
    expected = law.topk(10)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(logprobs.double(), expected.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(rest.double(), 1 - expected.values.exp().sum(-1), atol=1e-6, rtol=0)


def test_greedy_takes_the_largest_real_logit() -> None:
    """Catches greedy decoding that draws padding."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 9.0]])
    token, logprob_model, logprob_sampler = draw(
        logits.clone(), torch.zeros(1, dtype=torch.float64), 0.0, 0.95, num_tokens=3
    )
    assert token.item() == 1
    assert logprob_sampler.item() == 0
    assert logprob_model.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """Catches logits that overflow when divided, and log p lost in the tempered ones."""
    logits = torch.randn(50, 30) * 4
    u = torch.rand(50, dtype=torch.float64)
    token, logprob_model, logprob_sampler = draw(logits.clone(), u, temperature, 0.999, 30)
    law = logits.double().log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
    torch.testing.assert_close(logprob_model.double(), law, atol=1e-5, rtol=0)
    if temperature < 1:
        assert torch.equal(token, logits.argmax(-1))
        assert (logprob_sampler == 0).all()
    else:
        torch.testing.assert_close(logprob_sampler.exp(), torch.full((50,), 1 / 30))


def test_uniforms_are_a_function_of_seed_index_and_place() -> None:
    """Catches numbers that depend on how many are asked for, or repeat between samples."""
    assert np.array_equal(uniforms(3, 7, 10), uniforms(3, 7, 100)[:10])
    seen = {tuple(uniforms(s, i, 4)) for s in (0, 1, 2**32) for i in range(50)}
    assert len(seen) == 150
    flat = np.concatenate([uniforms(0, i, 50) for i in range(2000)])
    assert stats.kstest(flat, "uniform").pvalue > 0.001
