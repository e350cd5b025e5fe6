"""distill: stay close to theta* on the task's own contexts.

    loss + beta T^2 sum_t KL(p_theta*^T(.|x_<t) || p_theta^T(.|x_<t)),  p^T = softmax(logits / T)

summed over the task's response tokens and divided as the task's loss is. T^2 keeps the gradient's
scale whatever the temperature (Hinton et al. 2015, section 2). The KL is the full one at each
position, with every token of the vocabulary, but conditional on the task's contexts: prompts and
responses of the task, which p_theta* would rarely write. `cfs` penalises the KL of whole texts
under p_theta* instead (below eq. 2), and needs no teacher in training.

Sources: the KD baseline of Lin et al. 2023, "Mitigating the alignment tax of RLHF", whose cross
entropy with the frozen teacher differs from this KL by a constant; Yang et al., "Memory retaining
finetuning via distillation", which the paper cites.

Training computes it with `cfs.model.kl_head`, a few rows at a time.

Shapes: N targets, D model width, D* the teacher's, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

from cfs.baselines.method import Method
from cfs.cli import option


@dataclass
class Distill(Method):
    """The task's loss and the KL to a frozen theta* at its targets; the loop computes both."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "adds KL(theta* || theta) at the task's tokens, from a frozen teacher"
    source: ClassVar[str] = "Lin et al. 2023, arXiv 2309.06256 (its KD baseline)"
    needs_teacher: ClassVar[bool] = True
    distill: float = option(1.0, "weight of T^2 times the KL to theta* at the task's tokens")
    distill_temperature: float = option(1.0, "T, which both models' logits are divided by")

    def check(self) -> None:
        self.require("distill", 0 < self.distill < inf, "a number above 0")
        valid = 0 < self.distill_temperature < inf
        self.require("distill_temperature", valid, "a number above 0")

    @property
    def kl_weight(self) -> float:
        """beta T^2, what the KL of one task target weighs beside its -log p."""
        return self.distill * self.distill_temperature**2

    @property
    def distillation(self) -> tuple[float, float]:
        return self.kl_weight, self.distill_temperature


def plain_token_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
) -> Tensor:
    """The oracle, with all logits at once: KL(p_theta* || p_theta) at each target, in nats.

    hidden          (N, D) any float dtype, as are the next three
    weight          (V, D) the head
    teacher_hidden  (N, D*)
    teacher_weight  (V, D*)
    temperature     T of both distributions

    Returns (N,) float32.
    """
    ours = (hidden.float() @ weight.float().T / temperature).log_softmax(-1)
    theirs = (teacher_hidden.float() @ teacher_weight.float().T / temperature).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)
