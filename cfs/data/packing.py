"""A global batch cut into micro-batches of one rank, rows of like length together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfs.data.mixture import Draw


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right, which causal attention never looks at.

    input_ids    (B, T) int64, 0 where padded
    target_mask  (B, T) bool, False where padded
    synthetic    (N,) bool, for each target in row-major order: is it of a synthetic sample?
    draw_ids     (B,) place of each row in the global batch; empty for a filler without targets
    """

    input_ids: Tensor
    target_mask: Tensor
    synthetic: Tensor
    draw_ids: list[int]

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            self.input_ids.to(device),
            self.target_mask.to(device),
            self.synthetic.to(device),
            self.draw_ids,
        )


def micro_batches(
    draws: list[Draw], max_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """Deal a batch out to `world_size` ranks and cut this rank's part by tokens.

    Rows are sorted by length, so padding stays small, and dealt one by one, so ranks carry like
    loads. No micro-batch holds more than `max_tokens` tokens, padding counted, unless one row
    alone does. Every rank gets the same number of micro-batches, as FSDP's collectives need;
    one that runs out repeats a row without targets.
    """
    lengths = [len(draw.example.input_ids) for draw in draws]
    order = sorted(range(len(draws)), key=lambda i: (lengths[i], i))
    parts = [_cut(order[r::world_size], lengths, max_tokens) for r in range(world_size)]
    own, most = parts[rank], max(map(len, parts))
    filler = [collate(draws, order[:1], targets=False)] * (most - len(own))
    return [collate(draws, group) for group in own] + filler


def _cut(ids: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Groups of rising length, so each group's last row gives its padded length."""
    groups: list[list[int]] = []
    for i in ids:
        if groups and (len(groups[-1]) + 1) * lengths[i] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def collate(draws: list[Draw], ids: list[int], targets: bool = True) -> MicroBatch:
    """Stack `draws[ids]` to the longest; `targets=False` makes a filler that no term counts."""
    rows = [draws[i] for i in ids]
    shape = (len(rows), max(len(d.example.input_ids) for d in rows))
    input_ids = np.zeros(shape, dtype=np.int64)
    target_mask = np.zeros(shape, dtype=bool)
    synthetic = np.zeros(shape, dtype=bool)
    for row, draw in enumerate(rows):
        length = len(draw.example.input_ids)
        input_ids[row, :length] = draw.example.input_ids
        if targets:
            target_mask[row, :length] = draw.example.target_mask
        synthetic[row] = draw.synthetic
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(target_mask),
        torch.from_numpy(synthetic[target_mask]),
        list(ids) if targets else [],
    )
