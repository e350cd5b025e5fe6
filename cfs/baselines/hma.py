"""HMA: weights averaged with theta* block by block, by ratios that are learnt.

    theta(alpha)_i = alpha_b theta*_i + (1 - alpha_b) theta_tuned,i     for the weights i of block b
    alpha_b = alpha K s_b / sum_k s_k,   s_b = sigmoid(a_b) + eps

over K blocks, so that the mean of the alpha_b is alpha: one number says how much of theta* is kept
in all, and the K numbers a_b, the only ones that train, where. (Lin et al. 2023, "Mitigating the
alignment tax of RLHF", arXiv 2309.06256; there the a_b are trained on outputs of high reward, here
on the task, whose loss is what is to stay low at the given alpha.) alpha_b may exceed 1 as theirs.

By the chain rule d loss / d alpha_b is the inner product over the block's weights of the gradient
with theta* - theta_tuned. So a step is the ordinary forward and backward pass, an inner product
per block, Adam on K numbers, and weights mixed anew; the optimizer has nothing to do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from cfs.baselines.method import Method, Setting, pieces
from cfs.cli import option

EPS = 0.2
"""Theirs: no ratio can come below eps / (1 + eps) of another."""


def block_of(name: str, num_layers: int, num_blocks: int) -> int:
    """Which of the K blocks a parameter is in: layers in K runs of like length.

    The embedding goes with the first block; the last norm and the head go with the last.
    """
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer is not None:
        return int(layer[1]) * num_blocks // num_layers
    return 0 if name.startswith("embed_tokens") else num_blocks - 1


def ratios(logits: Tensor, alpha: float) -> Tensor:
    """(K,) a -> (K,) alpha_b, whose mean is `alpha`."""
    shares = logits.sigmoid() + EPS
    return alpha * len(logits) * shares / shares.sum()


@dataclass
class HMA(Method):
    """Heterogeneous model averaging."""

    name = "hma"
    summary = "the result of fine-tuning averaged with theta*, by learnt ratios per block"
    source = "Lin et al. 2023, arXiv 2309.06256"
    needs_original = True
    needs_tuned = True
    keeps_tuned = True
    claims = {"the update": "mixes two models, and trains the ratios alone"}  # noqa: RUF012
    excludes = {  # noqa: RUF012
        "l2": "the weights are a mixture with theta* already",
        "l2-init": "the weights are a mixture with theta* already",
        "ewc": "the weights are a mixture with theta* already",
        "sfa": "the weights are a mixture with theta* already",
        "freeze": "no weight trains by itself",
    }
    hma_alpha: float = option(0.5, "mean share of theta*")
    hma_blocks: int = option(3, "blocks of layers with a ratio of their own")
    hma_lr: float = option(0.02, "Adam's learning rate of the ratios' logits")

    def check(self) -> None:
        self.require("hma_alpha", 0 <= self.hma_alpha <= 1, "in [0, 1]")
        self.require("hma_blocks", self.hma_blocks >= 1, "at least 1")
        self.require("hma_lr", 0 < self.hma_lr < inf, "above 0")

    def begin(self, setting: Setting) -> None:
        self.setting = setting
        numbers = [re.match(r"layers\.(\d+)\.", shard.name) for shard in setting.shards]
        num_layers = 1 + max(int(number[1]) for number in numbers if number is not None)
        self.require("hma_blocks", self.hma_blocks <= num_layers, f"at most {num_layers} layers")
        self.blocks = [block_of(s.name, num_layers, self.hma_blocks) for s in setting.shards]
        if not hasattr(self, "logits"):
            self.logits = torch.zeros(self.hma_blocks, dtype=torch.float64, requires_grad=True)
            self.adam = torch.optim.Adam([self.logits], lr=self.hma_lr)
        self.set_weights()

    @torch.no_grad()
    def set_weights(self) -> None:
        """Set the weights to theta(alpha)."""
        alphas = ratios(self.logits, self.hma_alpha).tolist()
        at = self.setting
        rows = zip(self.blocks, at.shards, at.original, at.tuned[0], strict=True)
        for block, shard, original, tuned in rows:
            for here, star, other in pieces(shard.local, original, tuned):
                there = other.to(here.device).float()
                here.copy_(torch.lerp(there, star.to(here.device).float(), alphas[block]))

    @torch.no_grad()
    def before_step(self, step: int) -> Tensor | None:
        """Takes the gradients for the ratios. Returns zero, or NaN where they are not finite, so
        that the step is refused before anything moves."""
        at = self.setting
        slopes = torch.zeros(self.hma_blocks, dtype=torch.float64, device=at.shards[0].local.device)
        rows = zip(self.blocks, at.shards, at.original, at.tuned[0], strict=True)
        for block, shard, original, tuned in rows:
            if shard.grad is not None:
                for grad, star, other in pieces(shard.grad, original, tuned):
                    away = star.to(grad.device).float() - other.to(grad.device).float()
                    slopes[block] += torch.dot(grad.float(), away)
                shard.parameter.grad = None
        self.slopes = at.total(slopes.clone()).cpu()
        return 0.0 * slopes.sum()

    def after_step(self, step: int) -> None:
        """Move the ratios by the slopes, and the weights to what they now say."""
        alphas = ratios(self.logits, self.hma_alpha)
        (self.logits.grad,) = torch.autograd.grad(alphas, self.logits, self.slopes)
        self.adam.step()
        self.set_weights()

    def state(self) -> dict[str, Any]:
        adam = self.adam.state.get(self.logits, {})
        moments = {key: adam[key].tolist() for key in ("step", "exp_avg", "exp_avg_sq") if adam}
        return {"logits": self.logits.tolist(), "adam": moments}

    def set_state(self, state: dict[str, Any]) -> None:
        self.logits = torch.tensor(state["logits"], dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.logits], lr=self.hma_lr)
        if state["adam"]:
            moments = {k: torch.tensor(v, dtype=torch.float64) for k, v in state["adam"].items()}
            moments["step"] = moments["step"].float()
            self.adam.state[self.logits] = moments
