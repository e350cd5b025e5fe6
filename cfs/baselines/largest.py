"""The exact k-th largest magnitude of tensors whose elements lie on several ranks.

The bit pattern of a float32 that is not negative, read as an integer, rises with its value. So a
count of all elements by the upper half of their patterns tells the upper half of the k-th largest,
and a count of those that share it tells the lower half. Ranks add up counts; no element travels.

Shapes: G groups of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from cfs.baselines.method import pieces

HALF_BITS = 16
NUM_BINS = 2**HALF_BITS
LOWER_HALF = NUM_BINS - 1


def kth_largest(
    groups: Sequence[Iterable[Tensor]], ks: Sequence[int], total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Of each group, the k-th largest |value| over all ranks, exactly.

    groups  this rank's tensors of each, one or more, of which any may be empty: contiguous, all on
            one device, float32 or narrower, without NaN. A group is iterated twice, so it is a
            list, or makes its tensors anew each time
    ks      of each group, from 0 to its number of elements over all ranks
    total   sum of an int64 tensor over the ranks, in place

    Returns (G,) float32, infinity where k is 0. `abs() >= threshold` then holds for k elements,
    and for all others that tie with the k-th.

    Collective: `total` is called twice, with `NUM_BINS` counts a group. Elements are read twice,
    in pieces, and nothing is sorted; on a device the host waits for each piece.
    """
    counts = total(torch.stack([_counts(group) for group in groups]))
    places = torch.tensor(ks, device=counts.device).unsqueeze(1)
    is_possible = (places >= 0) & (places <= counts.sum(1, keepdim=True))
    assert bool(is_possible.all()), "k is negative, or larger than the number of elements"
    upper, places_within = _bin_of(counts, places)
    halves = zip(groups, upper, strict=True)
    counts = total(torch.stack([_counts(group, half) for group, half in halves]))
    lower, _ = _bin_of(counts, places_within)
    values = (upper << HALF_BITS | lower).to(torch.int32).view(torch.float32)
    return values.masked_fill(places == 0, torch.inf).squeeze(1)


def _counts(tensors: Iterable[Tensor], upper: Tensor | None = None) -> Tensor:
    """How many elements have each upper half or, beside this upper one, each lower half.

    Returns (NUM_BINS,) int64.
    """
    assert not isinstance(tensors, Iterator), "a group is iterated twice"
    counts = None
    for tensor in tensors:
        for (piece,) in pieces(tensor):
            patterns = piece.float().abs().view(torch.int32)
            halves = patterns >> HALF_BITS
            if upper is not None:
                halves = patterns[halves == upper] & LOWER_HALF
            found = torch.bincount(halves, minlength=NUM_BINS)
            counts = found if counts is None else counts.add_(found)
    assert counts is not None, "a group has no tensor; an empty one would do"
    return counts


def _bin_of(counts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the element at a place, counted from 1 and from the highest bin down.

    counts  (G, NUM_BINS) int64
    places  (G, 1) int64

    Returns (G, 1) int64 twice: the bin, and the place among the bin's own elements.
    """
    from_top = counts.flip(1).cumsum(1)
    bins = NUM_BINS - 1 - torch.searchsorted(from_top, places)
    above = from_top.gather(1, NUM_BINS - 1 - bins) - counts.gather(1, bins)
    return bins, places - above
