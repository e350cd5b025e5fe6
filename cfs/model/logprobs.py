"""log p(target) from hidden states without the (N, V) logits: the head, fused with its softmax.

torch's own `linear_cross_entropy` (from 2.13) does not serve: it takes no weight per target unless
asked for each target's loss, which it then rounds to the inputs' dtype and whose gradients it
computes from recomputed logits.

Shapes: N targets, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**24
"""Float32 logits that exist at a time (64 MiB), unless half the head's elements are more: each
chunk reads and writes the head's whole gradient, and must be worth it."""


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The oracle: all logits at once. Shapes and result as in `chunked_logprobs`."""
    logits = hidden.float() @ weight.float().T
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows_per_chunk: int | None = None,
    grad_hint: Tensor | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T)[targets], in nats, a few rows at a time.

    hidden    (N, D) any float dtype
    weight    (V, D) any float dtype
    targets   (N,) int64
    grad_hint (N,) float32, the gradient that the result will get, where it is known beforehand

    Returns (N,) float32; N may be 0. Logits, softmax and both gradients are summed in float32.

    The backward pass recomputes the logits: four products with the head in all. With `grad_hint`
    the forward pass computes the gradients from the logits it has, and three suffice; a gradient
    that turns out to be another one is served as if there had been no hint.
    """
    rows = rows_per_chunk or rows_of_chunk(weight)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        grad_hint = None
    return _ChunkedLogprobs.apply(hidden, weight, targets, rows, grad_hint)  # type: ignore[no-any-return]


def rows_of_chunk(weight: Tensor) -> int:
    """Targets whose logits exist at a time; weight (V, D)."""
    vocab_size, width = weight.shape
    return max(1, LOGITS_PER_CHUNK // vocab_size, width // 2)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        grad_hint: Tensor | None,
    ) -> Tensor:
        ctx.rows = rows
        logprobs, *grads = _head(hidden, weight, targets, rows, grad_hint, ctx.needs_input_grad[1])
        ctx.save_for_backward(hidden, weight, targets, grad_hint, *grads)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, targets, grad_hint, *grads = ctx.saved_tensors
        if grad_hint is None or not torch.equal(grad, grad_hint):
            _, *grads = _head(hidden, weight, targets, ctx.rows, grad, ctx.needs_input_grad[1])
        return *grads, None, None, None


def _head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    grad: Tensor | None,
    wants_grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities and, with their gradient, the gradients of `hidden` and `weight`."""
    dtype = operand_dtype(hidden, weight)
    operand = weight.to(dtype)
    logprobs = hidden.new_empty(len(targets), dtype=torch.float32)
    grad_hidden = None if grad is None else torch.empty_like(hidden)
    wants_grad_weight &= grad is not None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad_weight else None
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        g = None if grad is None else grad[chunk, None]
        h = hidden[chunk].to(dtype)
        logprobs[chunk], grad_h = _chunk(h, operand, targets[chunk, None], g, grad_weight)
        if grad_hidden is not None and grad_h is not None:
            grad_hidden[chunk] = grad_h
    return logprobs, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor | None, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (R,) and the gradient of `hidden` (R, D); adds to `grad_weight`.

    targets, grad (R, 1). One (R, V) tensor is all there is: logits, turned in place into
    exponentials and then into their own gradient, and let go before the next chunk's.
    """
    logits = product(hidden, weight.T)
    logits.sub_(logits.amax(-1, keepdim=True))
    target_logits = logits.gather(-1, targets)
    exponentials = logits.exp_()
    sums = exponentials.sum(-1, keepdim=True)
    logprobs = (target_logits - sums.log()).squeeze(-1)
    if grad is None:
        return logprobs, None
    # d log p(t) / d logits = onehot(t) - softmax
    grad_logits = exponentials.mul_(-grad / sums).scatter_add_(-1, targets, grad).to(hidden.dtype)
    if grad_weight is not None:
        add_product(grad_weight, grad_logits.T, hidden)
    return logprobs, product(grad_logits, weight)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products multiply: float32, but bfloat16 where a device sums it in float32."""
    is_half = hidden.dtype == weight.dtype == torch.bfloat16
    return torch.bfloat16 if is_half and hidden.device.type != "cpu" else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with `total` in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
