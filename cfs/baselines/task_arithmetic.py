"""Task arithmetic: theta* and the sum of what fine-tuning on each task changed, scaled.

    theta = theta* + scale sum_k (theta_k - theta*)

theta_k is theta* after fine-tuning on task k, theta_k - theta* that task's vector; a negative scale
is to make the model forget the tasks (Ilharco et al. 2023, arXiv 2212.04089). With one model it
walks the line of wise-ft, with scale = 1 - alpha, and goes on beyond both ends: a scale above 1
exaggerates the task, one below 0 negates it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cfs.baselines.method import Method
from cfs.cli import option
from cfs.errors import UserError

DEFAULT_SCALE = 0.5
"""With one model the same as wise-ft's default."""


@dataclass
class TaskArithmetic(Method):
    """One model for each scale, all from theta* and the models of `--tuned`."""

    name = "task-arithmetic"
    summary = "theta* and the scaled sum of what fine-tuning on each task changed"
    source = "Ilharco et al. 2023, arXiv 2212.04089"
    needs_tuned = True
    takes_several = True
    merges = True
    claims: ClassVar[dict[str, str]] = {"the merge": "adds up task vectors"}
    task_scale: list[float] | None = option(  # noqa: RUF009 (it makes a field)
        None, f"what the sum counts; several for a sweep, negative to forget [{DEFAULT_SCALE}]", "X"
    )

    @property
    def scales(self) -> list[float]:
        return [DEFAULT_SCALE] if self.task_scale is None else self.task_scale

    def check(self) -> None:
        rule = "one or more different finite numbers"
        self.require("task_scale", all(map(math.isfinite, self.scales)), rule)
        self.require("task_scale", 0 < len(self.scales) == len(set(self.scales)), rule)

    def variants(self) -> list[str]:
        return [f"scale-{scale}" for scale in self.scales]

    def merged(self, variant: int, original: Tensor, tuned: list[Tensor]) -> Tensor:
        if not tuned:
            raise UserError("--tuned: no model; task-arithmetic needs one or more")
        return added(original, tuned, self.scales[variant])


def added(original: Tensor, tuned: list[Tensor], scale: float) -> Tensor:
    """original + scale * sum of (t - original) over `tuned`, for tensors of one shape and dtype.

    At scale 0 it is the original itself, bit for bit, and at scale 1 the only tuned one.
    """
    if scale == 0:
        return original
    if scale == 1 and len(tuned) == 1:
        return tuned[0]
    total = tuned[0] - original
    for other in tuned[1:]:
        total += other - original
    return total.mul_(scale).add_(original)
