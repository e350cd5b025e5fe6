"""log p(target) and the KL to a frozen teacher's distribution, without the (N, V) logits.

    KL(p_theta*^T || p_theta^T) at each target,  p^T = softmax(logits / T)

what `cfs.baselines.distill` adds to the loss; its `plain_token_kl` is the oracle.

Shapes: N targets, R of a chunk, D model width, D* the teacher's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cfs.model.logprobs import add_product, operand_dtype, product


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
            grad_hidden[chunk] = product(g, w)
            if grad_weight is not None:
                add_product(grad_weight, g.T, h)
        returned = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, returned, None, None, None, None, None


def _kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(theirs || ours) of log-probabilities (N, V) -> (N,)."""
    return (theirs.exp() * (theirs - ours)).sum(-1)


def _chunks(num_targets: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, num_targets, rows))


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the products multiply."""
    dtype = operand_dtype(hidden, weight)
    return hidden.to(dtype), weight.to(dtype)


def _logits(operands: tuple[Tensor, Tensor], chunk: slice) -> Tensor:
    """(R, V) float32."""
    hidden, weight = operands
    return product(hidden[chunk], weight.T)
