"""A global batch cut into micro-batches: documents end to end, dealt out evenly over the ranks.

Shapes: B rows, T positions of a row, N targets.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cfs.data.mixture import Draw


@dataclass(frozen=True)
class MicroBatch:
    """One row of documents end to end; or one document a row, padded on the right (the twin).

    input_ids    (1, T) int64; (B, T) and 0 where padded
    target_mask  (1, T) bool; (B, T) and False where padded; never at a document's first token,
                 so that a shift by one position takes no target into its neighbour
    synthetic    (N,) bool, for each target in row-major order: was its example mixed in?
    weights      (N,) float32, what it counts in the loss besides; None for 1 each
    lengths      positions of each document, in order; empty where each has a row of its own
    draw_ids     place of each document in the global batch; empty for a filler without targets
    """

    input_ids: Tensor
    target_mask: Tensor
    synthetic: Tensor
    lengths: list[int]
    draw_ids: list[int]
    weights: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Positions that a forward pass computes; padding, where there is any, is among them."""
        return self.input_ids.numel()

    @property
    def document_of_target(self) -> Tensor:
        """(N,) int64, for each target the place of its document in `draw_ids`."""
        if not self.lengths:
            return self.target_mask.nonzero()[:, 0]
        sizes = torch.tensor(self.lengths, device=self.target_mask.device)
        documents = torch.arange(len(self.lengths), device=self.target_mask.device)
        return documents.repeat_interleave(sizes)[self.target_mask[0]]

    def to(self, device: torch.device) -> MicroBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            target_mask=self.target_mask.to(device),
            synthetic=self.synthetic.to(device),
            weights=None if self.weights is None else self.weights.to(device),
        )


def micro_batches(
    draws: list[Draw], max_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's micro-batches of the batch `draws`, at most `max_tokens` tokens each.

    Only a document that is longer by itself exceeds that, and lies alone. Every rank gets the
    same number, as FSDP's collectives need, and the j-th ones of all ranks carry like loads; one
    without a document repeats the shortest, without targets.
    """
    lengths = [len(draw.example.input_ids) for draw in draws]
    bins = _balanced_bins(lengths, max_tokens, world_size)
    bins.sort(key=lambda ids: -sum(lengths[i] for i in ids))
    shortest = lengths.index(min(lengths))
    return [
        packed_batch(draws, sorted(ids, key=lambda i: (lengths[i], i)))
        if ids
        else packed_batch(draws, [shortest], targets=False)
        for ids in bins[rank::world_size]
    ]


def _balanced_bins(lengths: list[int], max_tokens: int, world_size: int) -> list[list[int]]:
    """Places in `lengths` in k * world_size bins of like loads, for the smallest k that is found.

    Longest first into the emptiest bin (Graham's LPT rule), which leaves no bin more than a third
    above the best possible; where that exceeds `max_tokens`, once more with a larger k.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, -(-sum(min(n, max_tokens) for n in lengths) // (max_tokens * world_size)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * world_size)]
        loads = [(0, b) for b in range(len(bins))]
        for i in longest_first:
            load, b = loads[0]
            if bins[b] and load + lengths[i] > max_tokens:
                break
            bins[b].append(i)
            heapq.heapreplace(loads, (load + lengths[i], b))
        else:
            return bins
        per_rank += 1


def packed_batch(draws: list[Draw], ids: list[int], targets: bool = True) -> MicroBatch:
    """`draws[ids]` end to end; `targets=False` makes a filler that no term counts."""
    rows = [draws[i] for i in ids]
    lengths = [len(draw.example.input_ids) for draw in rows]
    target_mask = np.concatenate([draw.example.target_mask for draw in rows])
    assert not target_mask[np.cumsum([0, *lengths[:-1]])].any(), "nothing predicts a first token"
    target_mask &= targets
    synthetic = np.repeat([draw.synthetic for draw in rows], lengths)
    return MicroBatch(
        torch.from_numpy(np.concatenate([draw.example.input_ids for draw in rows]))[None],
        torch.from_numpy(target_mask)[None],
        torch.from_numpy(synthetic[target_mask]),
        lengths,
        list(ids) if targets else [],
        _target_weights(rows, target_mask, lengths),
    )


def padded_batch(draws: list[Draw], ids: list[int]) -> MicroBatch:
    """The plain twin: `draws[ids]`, one a row, padded on the right, where nothing looks."""
    rows = [draws[i] for i in ids]
    shape = (len(rows), max(len(draw.example.input_ids) for draw in rows))
    input_ids = np.zeros(shape, dtype=np.int64)
    target_mask = np.zeros(shape, dtype=bool)
    for row, draw in enumerate(rows):
        length = len(draw.example.input_ids)
        input_ids[row, :length] = draw.example.input_ids
        target_mask[row, :length] = draw.example.target_mask
    synthetic = np.repeat([draw.synthetic for draw in rows], target_mask.sum(1))
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(target_mask),
        torch.from_numpy(synthetic),
        [],
        list(ids),
        _target_weights(rows, target_mask, [shape[1]] * len(rows)),
    )


def _target_weights(rows: list[Draw], target_mask: np.ndarray, lengths: list[int]) -> Tensor | None:
    """Each target's weight, in row-major order; `lengths` are positions of each row's draw."""
    if all(draw.weight == 1.0 for draw in rows):
        return None
    weights = np.repeat(np.array([d.weight for d in rows], dtype=np.float32), lengths)
    return torch.from_numpy(weights[target_mask.flatten()])
