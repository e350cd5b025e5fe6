"""The nucleus of top-p sampling, exactly and without sorting the vocabulary.

Of a row of logits, the nucleus is the most probable tokens up to and with the one at which their
sum reaches p; of equal logits the lower id comes first. Three functions compute it: `by_sort`, the
definition; `by_histogram`, fast on a CPU; `by_bisection`, which asks the host nothing and so runs
inside a CUDA graph. Weights are exp(logit - largest) in float32 (to about 1e-7 times the distance
in nats) and every sum that decides who is in is float64, so the three agree to the last token.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOKENS_PER_BIN, MOST_BINS = 48, 1024
SPANS = 4
"""Bins go on beyond those a nucleus can reach: adding all the rest into one place is slow."""
CACHED_LOGITS = 410_000
"""Logits that a CPU cuts at a time: with what is made of them about a level-2 cache full."""
WAYS = 8
"""Parts into which one pass of the bisection cuts the interval that holds the threshold."""


class Nucleus(NamedTuple):
    """Who may be drawn from each row.

    weights  (B, V) float32, exp(logit - largest) of the tokens in the nucleus, 0 of the others
    total    (B,) float64, the sum of exp(logit - largest) over all V
    largest  (B,) float32
    """

    weights: Tensor
    total: Tensor
    largest: Tensor


def nucleus(logits: Tensor, top_p: float) -> Nucleus:
    """The nucleus of every row, by the device's fastest way. On a CPU it overwrites the logits.

    logits  (B, V) float32, already divided by the temperature; -inf is a token never drawn
    top_p   in (0, 1]; 1 keeps every token

    Logits that are not finite give weights without meaning, but no error.
    """
    if top_p >= 1.0:
        return _all_of(logits)
    by = by_histogram if logits.device.type == "cpu" else by_bisection
    return by(logits, top_p)


def by_sort(logits: Tensor, top_p: float) -> Nucleus:
    """The definition, as the oracle of the other two."""
    weights, total, largest = _all_of(logits)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, order).double()
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept.scatter_(-1, order, before < top_p * total[:, None])
    return Nucleus(weights * kept, total, largest)


def by_histogram(logits: Tensor, top_p: float) -> Nucleus:
    """Bins of equal width in the logit; only the bin in which the sum crosses p is sorted.

    A token less probable than (1 - p) / V of the most probable one lies outside any nucleus, so
    the sum crosses p in a bin within log(V / (1 - p)) nats of the largest logit. The weights
    overwrite the logits: a few rows at a time stay in the processor's cache from the first pass
    to the last.
    """
    num_rows, vocabulary = logits.shape
    largest = logits.amax(-1)
    if not largest.isfinite().all():
        return _all_of(logits)
    total = torch.empty(num_rows, dtype=torch.float64)
    before = torch.empty(num_rows, dtype=torch.float64)
    crossings: list[_Crossing] = []
    rows_at_once = max(1, CACHED_LOGITS // vocabulary)
    for start in range(0, num_rows, rows_at_once):
        rows = slice(start, start + rows_at_once)
        total[rows], before[rows], crossing = _cut(logits[rows], largest[rows], top_p)
        crossings.append(crossing._replace(row=crossing.row + start))
    row, token, logit, weight = (torch.cat(parts) for parts in zip(*crossings, strict=True))
    keeps = _leading(row, logit, weight, before, top_p * total)
    logits[row[keeps], token[keeps]] = weight[keeps]
    return Nucleus(logits, total, largest)


class _Crossing(NamedTuple):
    """The tokens of the bins in which the sums cross p, each (N,), by rising row and token."""

    row: Tensor
    token: Tensor
    logit: Tensor
    weight: Tensor


def _cut(logits: Tensor, largest: Tensor, top_p: float) -> tuple[Tensor, Tensor, _Crossing]:
    """Leave in `logits` the weights of the bins above the crossing one, and 0 elsewhere.

    Returns the sum of all weights and the sum before the crossing bin, both (B,) float64, and
    what is in that bin.
    """
    vocabulary = logits.shape[1]
    bins_in_span = min(MOST_BINS, 16 + vocabulary // TOKENS_PER_BIN)
    num_bins = SPANS * bins_in_span
    span = math.log(vocabulary / (1 - top_p)) + 1
    bins = _halvings(logits, largest)
    weights = bins.exp2()
    per_halving = -bins_in_span * math.log(2) / span
    bins.mul_(per_halving).clamp_(max=num_bins - 1).floor_()
    mass = torch.zeros(len(logits), num_bins, dtype=torch.float64)
    mass = mass.scatter_add_(-1, bins.int().long(), weights.double()).cumsum(-1)  # long() crawls
    total = mass[:, -1]
    bin_ = torch.searchsorted(mass, top_p * total[:, None]).clamp_(max=num_bins - 1)
    before = mass.gather(-1, (bin_ - 1).clamp(min=0)) * (bin_ > 0)
    crossing = bin_.float()
    # numpy compares faster than torch, and torch multiplies faster by 0.0 than by False.
    flat = torch.from_numpy(np.flatnonzero(bins.numpy() == crossing.numpy()))
    row = flat // vocabulary
    token = flat - row * vocabulary
    found = _Crossing(row, token, logits[row, token], weights.view(-1)[flat])
    torch.mul(weights, bins.neg_().add_(crossing).clamp_(0, 1), out=logits)
    return total, before.squeeze(-1), found


def _leading(
    row: Tensor, logits: Tensor, weights: Tensor, before: Tensor, needed: Tensor
) -> Tensor:
    """Which of some tokens, a few of each row, start below the sum that is needed.

    row, logits, weights  (N,), in rising order of row and token id
    before, needed        (B,) float64, the sum before them and that at which the nucleus ends

    Returns (N,) bool.
    """
    counts = torch.bincount(row, minlength=len(before))
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape = (len(before), int(counts.max()))
    table = torch.full(shape, -math.inf).index_put_((row, column), logits)
    order = table.sort(dim=-1, descending=True, stable=True).indices
    ordered = torch.zeros(shape).index_put_((row, column), weights).gather(-1, order).double()
    starts = before[:, None] + ordered.cumsum(-1) - ordered
    keeps = torch.zeros(shape, dtype=torch.bool)
    return keeps.scatter_(-1, order, starts < needed[:, None])[row, column]


def log_normalizer(logits: Tensor) -> Tensor:
    """log of the sum of exp(logits) over each row, (B, V) float32 -> (B,) float64."""
    rows = len(logits) if logits.device.type != "cpu" else max(1, CACHED_LOGITS // logits.shape[1])
    largest = logits.amax(-1)
    sums = [
        _halvings(some, most).exp2_().sum(-1)
        for some, most in zip(logits.split(rows), largest.split(rows), strict=True)
    ]
    return largest.double() + torch.cat(sums).double().log()


def by_bisection(logits: Tensor, top_p: float) -> Nucleus:
    """Search the least logit of the nucleus among all float32 numbers, a few bits a pass."""
    return Nucleus(*_bisection(logits.device.type)(logits, top_p))


@cache
def _bisection(device_type: str) -> Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    """On CUDA compiled, so that a pass reads each row once for all its sums."""
    return torch.compile(_bisect, dynamic=False) if device_type == "cuda" else _bisect


def _bisect(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits + 0.0  # one zero, not two
    weights, total, largest = _all_of(logits)
    needed = (top_p * total)[:, None]
    bits = logits.view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    low = torch.full_like(needed, -(2**31), dtype=torch.int64)  # its sum reaches what is needed
    high = keys.amax(-1, keepdim=True).long() + 1  # its sum does not
    for _ in range(math.ceil(32 / math.log2(WAYS))):
        width = high - low
        tried = [low + width * way // WAYS for way in range(1, WAYS)]
        sums = [
            torch.where(keys >= key, weights, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
            for key in tried
        ]
        for key, sum_from in zip(tried, sums, strict=True):
            low = torch.where(sum_from >= needed, torch.maximum(low, key), low)
            high = torch.where(sum_from >= needed, high, torch.minimum(high, key))
    ties, above = keys == low, keys > low
    before = torch.where(above, weights, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    tied_weight = torch.where(ties, weights, 0.0).amax(-1, keepdim=True).double()
    # Ties are kept in order of their ids while the sum before them is below what is needed.
    num_kept = ((needed - before) / tied_weight).ceil().clamp(min=1)
    rank = ties.cumsum(-1, dtype=torch.int32)
    kept = above | (ties & (rank <= num_kept))
    return torch.where(kept, weights, 0.0), total, largest


def _halvings(logits: Tensor, largest: Tensor) -> Tensor:
    """(logit - largest) in units of log 2: on a CPU exp2 is cheaper than exp."""
    return (logits - largest[:, None]).mul_(1 / math.log(2))


def _all_of(logits: Tensor) -> Nucleus:
    """Every token may be drawn."""
    largest = logits.amax(-1)
    weights = _halvings(logits, largest).exp2_()
    return Nucleus(weights, weights.sum(-1, dtype=torch.float64), largest)
