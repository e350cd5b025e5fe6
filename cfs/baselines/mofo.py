"""MoFO: in each step only the entries with the largest momentum move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cfs.baselines.largest import kth_largest
from cfs.baselines.method import Method, Setting, Update, pieces
from cfs.cli import option


@dataclass
class Mofo(Method):
    """AdamW whose update of a matrix is filtered by the magnitude of its running mean m:

        theta <- (1 - lr * decay) * theta - lr * [|m| >= tau] * m_hat / (sqrt(v_hat) + eps)

    tau is the k-th largest |m| of the whole matrix, and k a share of its entries; those that tie
    with tau all move. Embeddings and head are matrices too; gains of norms are not filtered. m and
    v take in the gradient of every entry.

    Source: Chen et al. 2024, and the authors' `algorithms_MoFO.py` for ties, for k (rounded down;
    here at least 1, where theirs fails) and for what is filtered. With 8-bit states m is what they
    hold. With bfloat16 masters the decay of entries that do not move is rounded to nearest, so one
    far below their resolution is lost.
    """

    name = "mofo"
    summary = "AdamW that moves only the entries with the largest momentum, in each matrix"
    source = "Chen et al. 2024, arXiv 2407.20999"
    claims: ClassVar[dict[str, str]] = {
        "the update": "moves only the entries with the largest momentum"
    }
    filters = True

    mofo_fraction: float = option(0.15, "share of a matrix's entries that move in a step")

    def check(self) -> None:
        self.require("mofo_fraction", 0.0 < self.mofo_fraction <= 1.0, "in (0, 1]")

    def begin(self, setting: Setting) -> None:
        self.total = setting.total

    def after_update(self, update: Update) -> None:
        """Collective, by `kth_largest`: two sums of counts over the ranks for every matrix."""
        shape = update.shard.whole_shape
        if len(shape) < 2 or self.mofo_fraction == 1.0:
            return
        num_moved = max(1, int(shape.numel() * self.mofo_fraction))
        mean = update.read_exp_avg()
        threshold = kth_largest([[mean]], [num_moved], self.total)
        for weights, before, exp_avg in pieces(update.weights, update.before, mean):
            decayed = (before * update.decayed).to(weights.dtype)
            weights.copy_(torch.where(exp_avg.abs() >= threshold, weights, decayed))
