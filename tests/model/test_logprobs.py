"""The chunked head against one that holds every logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfs.model.logprobs import LOGITS_PER_CHUNK, chunked_logprobs, plain_logprobs
from tests.conftest import tiny_model


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 64, None])
def test_values_and_gradients_equal_plain(rows_per_chunk: int | None) -> None:
    """Catches a chunk boundary that drops, doubles or misplaces a row's gradient."""
    hidden, weight = torch.randn(50, 16), torch.randn(33, 16)
    targets, grad = torch.randint(0, 33, (50,)), torch.randn(50)
    results = []
    for function in (plain_logprobs, lambda h, w, t: chunked_logprobs(h, w, t, rows_per_chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = function(h, w, targets)
        logprobs.backward(grad)
        results.append((logprobs.detach(), h.grad, w.grad))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_per_chunk", [3, 50])
@pytest.mark.parametrize("is_right", [True, False])
def test_a_gradient_known_ahead_changes_nothing(rows_per_chunk: int, is_right: bool) -> None:
    """Catches the forward pass's gradients handed out for another gradient than it was told."""
    hidden, weight = torch.randn(50, 16), torch.randn(33, 16)
    targets, grad = torch.randint(0, 33, (50,)), torch.randn(50)
    hint = grad.clone() if is_right else grad + (torch.arange(50) == 7)
    results = []
    for given in (None, hint):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = chunked_logprobs(h, w, targets, rows_per_chunk, given)
        logprobs.backward(grad)
        results.append((logprobs.detach(), h.grad, w.grad))
    for without, with_hint in zip(*results, strict=True):
        assert torch.equal(with_hint, without)


class _Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() // 4 for x in tensors)])
        return out


def test_memory_is_flat_in_the_number_of_targets() -> None:
    """Catches the (N, V) logits of a long batch, at Llama 3's vocabulary; nothing is allocated."""
    vocabulary, width = 128_256, 64
    largest = []
    for num_targets in (1024, 8192, 65536):
        with torch.device("meta"):
            hidden = torch.empty(num_targets, width, requires_grad=True)
            weight = torch.empty(vocabulary, width, requires_grad=True)
            targets = torch.empty(num_targets, dtype=torch.int64)
            grad = torch.empty(num_targets)
        with _Allocations() as seen:
            chunked_logprobs(hidden, weight, targets).backward(grad)
        largest.append(seen.largest)
    assert largest[0] <= max(LOGITS_PER_CHUNK, vocabulary * width)
    assert largest[0] == largest[1] == largest[2]


def test_gradcheck() -> None:
    """Catches a wrong derivative, independently of the plain twin's autograd."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(6, 4) * 0.5, torch.randn(5, 4) * 0.5
    targets = torch.randint(0, 5, (6,))
    weight.requires_grad_()
    chunked_logprobs(hidden, weight, targets, 4).sum().backward()
    for v, d in ((0, 0), (2, 3), (4, 1)):
        step = torch.zeros_like(weight)
        step[v, d] = 1e-2
        with torch.no_grad():
            up, down = (
                chunked_logprobs(hidden, weight + s * step, targets).double().sum() for s in (1, -1)
            )
        assert weight.grad is not None
        assert float(weight.grad[v, d]) == pytest.approx(float(up - down) / 2e-2, abs=1e-3)


def test_no_targets_is_empty_with_zero_gradient() -> None:
    """Catches NaN from a fully masked micro-batch."""
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logprobs = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("tied", [True, False])
def test_model_gives_the_log_probability_of_each_target(tied: bool) -> None:
    """Catches the off-by-one between a token and the position that predicts it."""
    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.randint(0, 97, (3, 12))
    mask = torch.rand(3, 12) < 0.5
    mask[:, 0] = False
    with torch.no_grad():
        expected = model(ids).log_softmax(-1)
        logprobs = model(ids, target_mask=mask)
    rows, columns = mask.nonzero(as_tuple=True)
    torch.testing.assert_close(
        logprobs, expected[rows, columns - 1, ids[rows, columns]], atol=1e-5, rtol=0
    )
