"""l2: a penalty on the distance that the weights have moved.

    loss + lambda ||theta - a||^2,  whose gradient is  2 lambda (theta - a)

The anchor a is theta*, the weights the run starts from (section 3, Table 10; without a half), or
the weights that training began with: Kumar et al.'s L2 init (2023), which regenerates towards the
initialisation however many tasks have come since. In a run on one task the two are the same; over
`--stages`, theta* moves on with each stage and the initialisation stays.

The gradient is added to the gradient shards after the backward pass, so it needs no communication
and no second model: one copy of the anchor over all ranks, in the checkpoint's own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from cfs.baselines.method import Method, Setting, Shard, pieces, zero_like_grads
from cfs.cli import option


@torch.no_grad()
def add_distance(
    shards: Sequence[Shard],
    anchors: list[Tensor],
    strength: float,
    scales: list[Tensor] | None = None,
) -> Tensor:
    """Add the gradient of strength * sum_i s_i (theta_i - a_i)^2 to the gradient shards.

    anchors  this rank's rows of a, any float dtype, on the shards' device or in host memory
    scales   likewise of s, float32; None for ones

    Returns this rank's share of the sum, without the strength: a float64 scalar on the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=shards[0].local.device)
    zero_like_grads(shards)
    for number, (shard, anchor) in enumerate(zip(shards, anchors, strict=True)):
        assert shard.grad is not None
        scale = shard.local if scales is None else scales[number]
        for here, grad, there, s in pieces(shard.local, shard.grad, anchor, scale):
            moved = here.float() - there.to(here.device, non_blocking=True).float()
            slope = moved if scales is None else s * moved
            grad.add_(slope, alpha=2.0 * strength)
            total += torch.dot(slope, moved)
    return total


@dataclass
class L2(Method):
    """The l2 baseline of the paper: the anchor is theta*."""

    name = "l2"
    summary = "adds a penalty on ||theta - theta*||^2"
    source = "the paper, section 3 and Table 10; Kirkpatrick et al. 2017"
    needs_original = True
    l2: float = option(1e-3, "weight of ||theta - theta*||^2 (Table 10); joins what it goes with")

    def check(self) -> None:
        self.require("l2", 0 <= self.l2 < inf, "0 or more")

    def begin(self, setting: Setting) -> None:
        self.shards, self.anchors = setting.shards, setting.original

    def before_step(self, step: int) -> Tensor | None:
        return self.l2 * add_distance(self.shards, self.anchors, self.l2)


@dataclass
class L2Init(Method):
    """The anchor is what training began with, `--init-model`."""

    name = "l2-init"
    summary = "adds a penalty on the distance to the weights before the first of several stages"
    source = "Kumar et al. 2023, arXiv 2308.11958"
    needs_initial = True
    l2_init: float = option(1e-3, "weight of ||theta - theta_0||^2")
    init_model: str | None = option(
        None, "theta_0 [the first of --stages; without them the model the run starts from]"
    )

    def check(self) -> None:
        self.require("l2_init", 0 <= self.l2_init < inf, "0 or more")

    def begin(self, setting: Setting) -> None:
        self.shards, self.anchors = setting.shards, setting.initial

    def before_step(self, step: int) -> Tensor | None:
        return self.l2_init * add_distance(self.shards, self.anchors, self.l2_init)
