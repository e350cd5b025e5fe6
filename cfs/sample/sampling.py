"""One draw from one row of logits, as pure functions.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, index: int, num_tokens: int) -> np.ndarray:
    """The numbers in [0, 1) that decide sample `index`: (num_tokens,) float64.

    Counter-based (Philox keyed by seed and index), so number t of sample i is the same in any
    batch, on any rank and for any `num_tokens`.
    """
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(num_tokens)


def top_p_mask(probabilities: Tensor, top_p: float) -> Tensor:
    """The nucleus: the most probable tokens up to and with the one at which their sum reaches p.

    probabilities  (B, V) float32, rows summing to 1
    top_p          in (0, 1]; 1 keeps every token

    Returns (B, V) bool. Of equal probabilities the lower token id comes first. Sums are float64.
    """
    if top_p >= 1.0:
        return torch.ones_like(probabilities, dtype=torch.bool)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(-1) - ordered.double()
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, order, before < top_p)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds u times the total.

    weights  (B, V) float32, not negative, not all zero in a row
    u        (B,) float64 in [0, 1)

    Returns (B,) int64; a token of weight zero is never drawn. Sums are float64.
    """
    cdf = weights.double().cumsum(-1)
    threshold = u[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    return token.clamp_(max=weights.shape[-1] - 1)  # NaN weights exceed nothing


def draw(
    logits: Tensor, u: Tensor, temperature: float, top_p: float, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row, and say how probable it was.

    logits      (B, V) any float dtype
    u           (B,) float64 in [0, 1)
    num_tokens  ids from here to V are padding of the vocabulary and are never drawn

    Returns token (B,) int64; log p_theta*(token), at temperature 1 and untruncated over all V,
    (B,) float32; and log q(token) of the law it was drawn from, (B,) float32; nats. Temperature
    0 takes the most probable token, with log q = 0.
    """
    logits = logits.float()
    real = logits[:, :num_tokens]
    if temperature == 0:
        token = real.argmax(-1)
        logprob_sampler = torch.zeros_like(u, dtype=torch.float32)
    else:
        q = (real / temperature).softmax(-1)
        q = q * top_p_mask(q, top_p)
        token = inverse_cdf(q, u)
        logprob_sampler = (_at(q, token) / q.sum(-1)).log()
    return token, _at(logits, token) - logits.logsumexp(-1), logprob_sampler


def _at(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(-1, token[:, None]).squeeze(-1)
