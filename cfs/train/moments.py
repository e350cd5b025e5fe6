"""AdamW's moments in float32 for the rows that a rank holds, and the update by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cfs.train.parallel import LocalShard, local_part

BETA1 = 0.9
EPS = 1e-8


class FloatMoments:
    """Running means of the gradient and of its square, shaped as the rank's rows.

    `EightBitMoments` has the same methods.
    """

    def __init__(self, shard: LocalShard) -> None:
        self.num_updates = 0
        self.span = element_range(shard.whole_shape, shard.rows)
        self._shard = shard
        self.exp_avg = zeros_like_rows(shard, torch.float32)
        self.exp_avg_sq = zeros_like_rows(shard, torch.float32)

    def update(
        self,
        weights: Tensor,
        grad: Tensor,
        place: range,
        lr: float,
        weight_decay: float,
        beta2: float,
    ) -> None:
        """Take one AdamW step, number `num_updates` from 1, on some of the rank's elements.

        weights, grad  (N,) float32; the weights change in place
        place          which N elements of the whole parameter they are
        """
        piece = slice(place.start - self.span.start, place.stop - self.span.start)
        adamw(
            [weights],
            [grad],
            [self.exp_avg.view(-1)[piece]],
            [self.exp_avg_sq.view(-1)[piece]],
            [],
            [torch.full((), self.num_updates - 1.0, device=weights.device)],  # it adds one
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )

    def mean(self) -> Tensor:
        """The running mean of the gradient, (N,) float32, to be read only."""
        return self.exp_avg.view(-1)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by key; it shares storage with the moments."""
        return {
            state_key("exp_avg", self._shard.name): self._shard.like(self.exp_avg),
            state_key("exp_avg_sq", self._shard.name): self._shard.like(self.exp_avg_sq),
        }

    def wanted(self, num_shards: int) -> dict[str, Tensor]:
        """What to fill from a checkpoint that `num_shards` shards have left, for `accept`."""
        return self.tensors()

    def accept(self, saved: dict[str, Tensor], num_shards: int) -> None:
        """Go on from what was filled: the moments themselves."""


def zeros_like_rows(shard: LocalShard, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(local_part(shard.parameter), dtype=dtype, requires_grad=False)


def element_range(shape: torch.Size, rows: slice) -> range:
    """Rows of a parameter of this shape, as a range of its elements."""
    width = math.prod(shape[1:])
    return range(rows.start * width, rows.stop * width)


def state_key(moment: str, name: str) -> str:
    return f"optimizer.{moment}.{name}"
