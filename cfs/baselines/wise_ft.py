"""Wise-FT: the result of fine-tuning averaged with theta*.

    theta = alpha theta* + (1 - alpha) theta_tuned

alpha multiplies the original weights, as in the paper (section 3, "Wise-FT"): 1 is theta*, 0 the
fine-tuned model. Wortsman et al. (2021, arXiv 2109.01903) write it the other way round: their alpha
multiplies the fine-tuned weights, and is 1 - alpha of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cfs.baselines.method import Method
from cfs.cli import option
from cfs.errors import UserError

DEFAULT_ALPHA = 0.5
"""What Table 3 reports; Tables 11 and 12 have the sweep."""


@dataclass
class WiseFT(Method):
    """One model for each alpha, all from one pair of checkpoints."""

    name = "wise-ft"
    summary = "the result of fine-tuning averaged with theta*"
    source = "the paper, section 3 and Table 11; Wortsman et al. 2021, arXiv 2109.01903"
    needs_tuned = True
    merges = True
    claims: ClassVar[dict[str, str]] = {"the merge": "averages with theta*"}
    wise_alpha: list[float] | None = option(  # noqa: RUF009 (it makes a field)
        None, f"share of theta* in the average; several for a sweep [{DEFAULT_ALPHA}]", "X"
    )

    @property
    def alphas(self) -> list[float]:
        return [DEFAULT_ALPHA] if self.wise_alpha is None else self.wise_alpha

    def check(self) -> None:
        rule = "one or more different numbers in [0, 1]"
        self.require("wise_alpha", all(0 <= alpha <= 1 for alpha in self.alphas), rule)
        self.require("wise_alpha", 0 < len(self.alphas) == len(set(self.alphas)), rule)

    def variants(self) -> list[str]:
        return [f"alpha-{alpha}" for alpha in self.alphas]

    def merged(self, variant: int, original: Tensor, tuned: list[Tensor]) -> Tensor:
        if len(tuned) != 1:
            raise UserError(
                f"--tuned: {len(tuned)} models, but wise-ft averages theta* with one; give one, or "
                "add several with --method task-arithmetic"
            )
        return average(original, tuned[0], self.alphas[variant])


def average(original: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """alpha original + (1 - alpha) tuned, for tensors of one shape and float dtype.

    At alpha 0 and 1 it is the input itself, bit for bit, whatever the other holds. Where the two
    agree it is what they agree on: the rounding of two products would move weights that
    fine-tuning left alone.
    """
    if alpha in (0, 1):
        return original if alpha == 1 else tuned
    return torch.lerp(tuned, original, alpha)
