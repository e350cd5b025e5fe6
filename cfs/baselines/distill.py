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

Shapes: N targets, D model width, D* the teacher's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
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


def plain_token_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
) -> Tensor:
    """The oracle: all logits at once. Shapes and result as the KL of `logprobs_and_kl`."""
    ours = (hidden.float() @ weight.float().T / temperature).log_softmax(-1)
    theirs = (teacher_hidden.float() @ teacher_weight.float().T / temperature).log_softmax(-1)
    return _kl(theirs, ours)


def logprobs_and_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """log p_theta(target) and KL(p_theta* || p_theta) of each target's distribution, in nats.

    hidden          (N, D) any float dtype, as are the next three
    weight          (V, D) the head
    targets         (N,) int64
    teacher_hidden  (N, D*)
    teacher_weight  (V, D*)
    temperature     of the KL's two distributions; log p is that of temperature 1
    rows            targets whose logits exist at a time

    Returns (N,) float32 twice; N may be 0. Gradients go to `hidden` and `weight` alone, and are
    summed in float32 over all chunks. The backward pass recomputes both models' logits, so until
    then the four tensors must keep their values.
    """
    assert weight.shape[0] == teacher_weight.shape[0], "both models have one vocabulary"
    assert rows > 0, "a chunk has rows"
    return _Chunked.apply(  # type: ignore[no-any-return]
        hidden, weight, targets, teacher_hidden, teacher_weight, temperature, rows
    )


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, teacher_hidden, teacher_weight)
        ctx.temperature, ctx.rows = temperature, rows
        student, teacher = _operands(hidden, weight), _operands(teacher_hidden, teacher_weight)
        logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
        kl = torch.empty_like(logprobs)
        for chunk in _chunks(len(targets), rows):
            logits = _logits(student, chunk)
            target_logits = logits.gather(-1, targets[chunk, None]).squeeze(-1)
            logprobs[chunk] = target_logits - logits.logsumexp(-1)
            ours = logits.div_(temperature).log_softmax(-1)
            theirs = _logits(teacher, chunk).div_(temperature).log_softmax(-1)
            kl[chunk] = _kl(theirs, ours)
        return logprobs, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_kl = (grad[:, None] for grad in grad_outputs)
        hidden, weight, targets, teacher_hidden, teacher_weight = ctx.saved_tensors
        student, teacher = _operands(hidden, weight), _operands(teacher_hidden, teacher_weight)
        grad_hidden = torch.empty_like(hidden)
        wants_grad_weight = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad_weight else None
        for chunk in _chunks(len(targets), ctx.rows):
            logits = _logits(student, chunk)
            # d log p(t) / d logits = onehot(t) - softmax(logits)
            grad_logits = logits.softmax(-1).mul_(-grad_logprobs[chunk])
            grad_logits.scatter_add_(-1, targets[chunk, None], grad_logprobs[chunk])
            # d KL / d logits = (softmax(logits / T) - softmax(teacher's / T)) / T
            excess = logits.div_(ctx.temperature).softmax(-1)
            excess -= _logits(teacher, chunk).div_(ctx.temperature).softmax(-1)
            grad_logits.addcmul_(excess, grad_kl[chunk], value=1 / ctx.temperature)
            h, w = student[0][chunk], student[1]
            g = grad_logits.to(h.dtype)
            grad_hidden[chunk] = _product(g, w)
            if grad_weight is not None:
                _add_product(grad_weight, g.T, h)
        returned = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, returned, None, None, None, None, None


def _kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(theirs || ours) of log-probabilities (N, V) -> (N,)."""
    return (theirs.exp() * (theirs - ours)).sum(-1)


def _chunks(num_targets: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, num_targets, rows))


# The products of the head as `cfs.model.logprobs` takes them; this floor imports no model.


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the products multiply: float32, but bfloat16 where a device sums it in float32."""
    is_half = hidden.dtype == weight.dtype == torch.bfloat16
    if is_half and hidden.device.type != "cpu":
        return hidden, weight
    return hidden.float(), weight.float()


def _logits(operands: tuple[Tensor, Tensor], chunk: slice) -> Tensor:
    """(R, V) float32."""
    hidden, weight = operands
    return _product(hidden[chunk], weight.T)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with `total` in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
