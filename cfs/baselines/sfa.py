"""SFA: averaging with theta* while training.

    every share f of the steps:  theta <- beta theta* + (1 - beta) theta

The optimizer's states are left as they are (Kleiman et al. 2025, "Soup to go", arXiv 2501.05559;
settings of the version in FLOW's public code, which averages before the step that follows the
boundary: the same, but that the last averaging there never comes at the very end).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cfs.baselines.method import Method, Setting, pieces
from cfs.cli import option


@dataclass
class SFA(Method):
    """Sequential fine-tuning with averaging, on one task."""

    name = "sfa"
    summary = "averages the weights with theta* a few times in the run"
    source = "Kleiman et al. 2025, arXiv 2501.05559"
    needs_original = True
    sfa_every: float = option(0.25, "share of the steps between averagings")
    sfa_beta: float = option(0.5, "weight of theta* in an average")

    def check(self) -> None:
        self.require("sfa_every", 0 < self.sfa_every < 1, "in (0, 1)")
        self.require("sfa_beta", 0 <= self.sfa_beta <= 1, "in [0, 1]")

    def begin(self, setting: Setting) -> None:
        self.shards, self.original = setting.shards, setting.original
        self.num_steps = setting.num_steps
        self.period = max(1, int(self.sfa_every * setting.num_steps))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        done = step + 1
        if done % self.period or done == self.num_steps:
            return
        for shard, original in zip(self.shards, self.original, strict=True):
            for here, there in pieces(shard.local, original):
                star = there.to(here.device).float()
                here.copy_(torch.lerp(here.float(), star, self.sfa_beta))  # exact at 0 and 1
