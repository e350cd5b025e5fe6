"""The drawn law, against the exact one in float64."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from scipy import stats

from cfs.sample.sampling import draw, inverse_cdf, top_p_mask, uniforms


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
    ("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.95), (0.6, 0.95), (1.2, 0.5), (1.0, 0.01)]
)
def test_frequencies_follow_the_exact_law(temperature: float, top_p: float) -> None:
    """Catches a wrong temperature, a nucleus cut in the wrong place, a biased draw."""
    num_draws, vocabulary, num_tokens = 200_000, 40, 37
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    u = torch.from_numpy(np.random.default_rng(5).random(num_draws))
    token, _, logprob = draw(
        logits.expand(num_draws, -1), u, temperature, top_p, num_tokens=num_tokens
    )
    law = exact_law(logits.numpy()[:num_tokens], temperature, top_p)
    counts = np.bincount(token.numpy(), minlength=num_tokens)
    assert len(counts) == num_tokens, "padding of the vocabulary is never drawn"
    assert not counts[law == 0].any(), "tokens outside the nucleus are never drawn"
    expected = law[law > 0] * num_draws
    if len(expected) > 1:
        rare = expected < 5  # pool, as the test's approximation needs
        observed = counts[law > 0]
        if rare.any():
            expected = np.append(expected[~rare], expected[rare].sum())
            observed = np.append(observed[~rare], observed[rare].sum())
        assert stats.chisquare(observed, expected).pvalue > 0.001
    np.testing.assert_allclose(logprob.numpy(), np.log(law[token.numpy()]), atol=1e-5)


@settings(max_examples=300, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.integers(-12, 12).map(float)),
    st.floats(0.01, 1.0),
)
def test_nucleus_equals_the_definition(logits: np.ndarray, top_p: float) -> None:
    """Catches `cumsum <= p`, which drops the token that crosses p, and wrong order of ties."""
    p = torch.from_numpy(logits)[None].softmax(-1)
    kept = top_p_mask(p, top_p)[0].numpy()
    values = p[0].double().numpy()
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(values[order]) - values[order]
    expected = np.zeros(len(values), dtype=bool)
    expected[order] = (before < top_p) | (top_p == 1.0)
    near_boundary = np.abs(before - top_p).min() < 1e-6
    assert kept[order[0]], "the most probable token always stays"
    assert near_boundary or (kept == expected).all()


def test_the_crossing_token_stays() -> None:
    """The paper's nucleus (and vLLM's) keeps the token at which the sum reaches p."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert top_p_mask(p, 0.7).tolist() == [[True, True, False, False]]
    assert top_p_mask(p, 0.81).tolist() == [[True, True, True, False]]
    assert top_p_mask(p, 0.3).tolist() == [[True, False, False, False]]
    assert top_p_mask(p, 1.0).all()


def test_inverse_cdf_edges() -> None:
    """Catches drawing a token of weight zero at either end of [0, 1)."""
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)
    u = torch.tensor([0.0, 0.2499999, 0.25, 1 - 1e-16], dtype=torch.float64)
    assert inverse_cdf(weights, u).tolist() == [1, 1, 3, 3]


def test_greedy_takes_the_largest_real_logit() -> None:
    """Catches greedy decoding that draws padding."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 9.0]])
    token, logprob_model, logprob_sampler = draw(
        logits, torch.zeros(1, dtype=torch.float64), 0.0, 0.95, num_tokens=3
    )
    assert token.item() == 1
    assert logprob_sampler.item() == 0
    assert logprob_model.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


def test_uniforms_are_a_function_of_seed_index_and_place() -> None:
    """Catches numbers that depend on how many are asked for, or repeat between samples."""
    assert np.array_equal(uniforms(3, 7, 10), uniforms(3, 7, 100)[:10])
    seen = {tuple(uniforms(s, i, 4)) for s in (0, 1, 2**32) for i in range(50)}
    assert len(seen) == 150
    flat = np.concatenate([uniforms(0, i, 50) for i in range(2000)])
    assert stats.kstest(flat, "uniform").pvalue > 0.001
