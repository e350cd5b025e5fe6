"""log p(target) from hidden states without the (N, V) logits: the head, fused with its softmax.

Shapes: N targets, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**24
"""Float32 logits that exist at a time (64 MiB), whatever the vocabulary and the batch."""


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The oracle: all logits at once. Shapes and result as in `chunked_logprobs`."""
    logits = hidden.float() @ weight.float().T
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows_per_chunk: int | None = None
) -> Tensor:
    """log softmax(hidden @ weight^T)[targets], in nats, a few rows at a time.

    hidden  (N, D) any float dtype
    weight  (V, D) any float dtype
    targets (N,) int64

    Returns (N,) float32; N may be 0. Logits, softmax and both gradients are computed in float32;
    the backward pass recomputes the logits, so the cost is one extra product with the head.
    """
    rows = rows_per_chunk or max(1, LOGITS_PER_CHUNK // weight.shape[0])
    return _ChunkedLogprobs.apply(hidden, weight, targets, rows)  # type: ignore[no-any-return]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        weight32 = weight.float()
        log_normalizers, logprobs = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = h.float() @ weight32.T
            log_normalizers.append(logits.logsumexp(-1))
            logprobs.append(logits.gather(-1, t[:, None]).squeeze(-1) - log_normalizers[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_normalizers))
        ctx.rows = rows
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grad_outputs
        hidden, weight, targets, log_normalizers = ctx.saved_tensors
        weight32 = weight.float()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight32)
        for start in range(0, len(targets), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            h, t, g = hidden[chunk].float(), targets[chunk], grad[chunk, None].float()
            # d log p(t) / d logits = onehot(t) - softmax
            grad_logits = (h @ weight32.T - log_normalizers[chunk, None]).exp_().mul_(-g)
            grad_logits.scatter_add_(-1, t[:, None], g)
            grad_hidden[chunk] = (grad_logits @ weight32).to(hidden.dtype)
            grad_weight.addmm_(grad_logits.T, h)
        return grad_hidden, grad_weight.to(weight.dtype), None, None
