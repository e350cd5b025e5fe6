"""EWC: l2 with a weight for each parameter, the Fisher information of p_theta*.

    loss + lambda sum_i F_i (theta_i - theta*_i)^2
    F_i = E_{x ~ p_theta*}[(d/d theta_i log p_theta(x))^2]  at theta*, of whole sequences x

Kirkpatrick et al. (2017) take F over the old task's data, with labels from the model, and write
lambda / 2. Here x is a context-free sample of theta* at temperature 1 and top-p 1, so that no data
is needed: F is then the (diagonal of the) Fisher information of the very law that the paper's KL
speaks of, and with lambda = 1/2 the penalty is the diagonal second-order approximation of
KL(p_theta* || p_theta) in nats per sequence. With F = 1 it is l2.

F is estimated from groups of G samples: the scores of independent samples of p_theta* have mean
zero, so E[(sum of G scores)^2] = G F, and G samples can share one backward pass and be dealt out
over the ranks. Each group counts as much as one sample would for the estimate's variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from cfs.baselines.l2 import add_distance
from cfs.baselines.method import Method, Setting, Shard
from cfs.cli import option

GROUP_SIZE = 8
"""Samples whose gradients are summed before they are squared."""


@torch.no_grad()
def add_squares(fisher: list[Tensor], shards: Sequence[Shard], num_samples: int) -> None:
    """Add the squares of one group's summed gradients, over all samples' number, to `fisher`.

    fisher       this rank's rows of each parameter, float32
    shards       with the gradients of -log p summed over the group and all ranks; let go here
    num_samples  of all groups together
    """
    for values, shard in zip(fisher, shards, strict=True):
        if shard.grad is not None:
            values.addcmul_(shard.grad.float(), shard.grad.float(), value=1.0 / num_samples)
            shard.parameter.grad = None


@dataclass
class EWC(Method):
    """Elastic weight consolidation on context-free samples."""

    name = "ewc"
    summary = "adds a penalty on the distance to theta*, weighted by its Fisher information"
    source = "Kirkpatrick et al. 2017"
    needs_original = True
    keeps = {"Fisher information": 4}  # noqa: RUF012 (a class variable of Method)
    ewc: float = option(1.0, "weight of the Fisher-weighted squared distance; 0.5: the KL's own")
    fisher_samples: int = option(1024, "context-free samples that the Fisher information takes")

    def check(self) -> None:
        self.require("ewc", 0 <= self.ewc < inf, "0 or more")
        is_whole = self.fisher_samples >= GROUP_SIZE and self.fisher_samples % GROUP_SIZE == 0
        self.require("fisher_samples", is_whole, f"a multiple of {GROUP_SIZE}")

    @property
    def num_fisher_samples(self) -> int:
        return self.fisher_samples

    def begin(self, setting: Setting) -> None:
        self.shards, self.original, self.fisher = setting.shards, setting.original, setting.fisher

    def before_step(self, step: int) -> Tensor | None:
        return self.ewc * add_distance(self.shards, self.original, self.ewc, self.fisher)
