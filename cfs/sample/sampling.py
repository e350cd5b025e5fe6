"""One draw from one row of logits, as pure functions.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cfs.sample.nucleus import log_normalizer, nucleus

BLOCK = 128
"""Tokens that `inverse_cdf` sums before it looks inside."""


def uniforms(seed: int, index: int, num_tokens: int) -> np.ndarray:
    """The numbers in [0, 1) that decide sample `index`: (num_tokens,) float64.

    Counter-based (Philox keyed by seed and index), so number t of sample i is the same in any
    batch, on any rank and for any `num_tokens`.
    """
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(num_tokens)


def inverse_cdf(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds u times the total.

    weights  (B, V) float32, not negative, not all zero in a row
    u        (B,) float64 in [0, 1)

    Returns token (B,) int64, never one of weight zero, and the total (B,) float64. Blocks of
    tokens are summed first (each in float32, over blocks in float64), then the tokens of the block
    that holds the draw.
    """
    vocabulary = weights.shape[-1]
    num_whole = vocabulary // BLOCK * BLOCK
    sums = weights[:, :num_whole].unflatten(-1, (-1, BLOCK)).sum(-1).double()
    if num_whole < vocabulary:
        rest = weights[:, num_whole:].sum(-1, keepdim=True).double()
        sums = torch.cat((sums, rest), -1)
    cdf = sums.cumsum(-1)
    total = cdf[:, -1]
    sought = (u * total)[:, None]
    block = torch.searchsorted(cdf, sought, right=True).clamp_(max=cdf.shape[-1] - 1)
    inside = sought - (cdf.gather(-1, block) - sums.gather(-1, block))
    tokens = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    theirs = weights.gather(-1, tokens.clamp(max=vocabulary - 1)).double()
    theirs = theirs.masked_fill(tokens >= vocabulary, 0.0)
    within = theirs.cumsum(-1)
    # Rounding may put the sought sum a hair past the block's end: then its last token is meant.
    place = torch.searchsorted(within, inside.clamp(min=0.0), right=True)
    last = torch.searchsorted(within, within[:, -1:].contiguous()).clamp_(max=BLOCK - 1)
    token = tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)
    return token.clamp_(max=vocabulary - 1), total  # sums that are not finite exceed nothing


def draw(
    logits: Tensor, u: Tensor, temperature: float, top_p: float, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row, and say how probable it was. May overwrite the logits.

    logits      (B, V) any float dtype
    u           (B,) float64 in [0, 1)
    num_tokens  ids from here to V are padding of the vocabulary and are never drawn

    Returns token (B,) int64; log p_theta*(token), at temperature 1 and untruncated over all V,
    (B,) float32; and log q(token) of the law it was drawn from, (B,) float32; nats. Temperature
    0 takes the most probable token, with log q = 0. Logits that are not finite give a
    log p_theta* that is not either.
    """
    logits = logits.float()
    real = logits[:, :num_tokens]
    if temperature == 0:
        token = real.argmax(-1)
        logprob_model = _at(logits, token).double() - log_normalizer(logits)
        return token, logprob_model.float(), torch.zeros_like(u).float()
    if temperature == 1:
        padding = logits[:, num_tokens:].double()
        weights, sum_real, largest = nucleus(real, top_p)
        token, sum_kept = inverse_cdf(weights, u)
        log_weight = _at(weights, token).double().log()
        # The weights' sum is most of the normalizer already.
        sum_all = sum_real + (padding - largest[:, None]).exp().sum(-1)
        logprob_model = log_weight - sum_all.log()
    else:
        # Whatever the temperature, the largest is finite: it is 0.
        tempered = (real - real.amax(-1, keepdim=True)).div_(temperature)
        weights, _, _ = nucleus(tempered, top_p)
        token, sum_kept = inverse_cdf(weights, u)
        log_weight = _at(weights, token).double().log()
        logprob_model = _at(logits, token).double() - log_normalizer(logits)
    return token, logprob_model.float(), (log_weight - sum_kept.log()).float()


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The head of the full distribution at temperature 1.

    logits  (B, V) any float dtype

    Returns ids (B, k) int32, most probable first; their log-probabilities (B, k) float32, nats;
    and the mass of all other tokens (B,) float32, exact to about 1e-7 absolutely.
    """
    values, ids = logits.float().topk(k)
    logprobs = values.double() - log_normalizer(logits.float())[:, None]
    rest = 1 - logprobs.exp().sum(-1)
    return ids.to(torch.int32), logprobs.float(), rest.clamp_(min=0).float()


def _at(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(-1, token[:, None]).squeeze(-1)
