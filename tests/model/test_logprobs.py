"""The chunked head against one that holds every logit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cfs.model import logprobs as head
from cfs.model.logprobs import LOGITS_PER_CHUNK, chunked_logprobs, plain_logprobs
from tests.conftest import tiny_model
from tests.model.allocations import Allocations

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_hint_costs_only_the_products_that_are_wanted(
    is_frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gradients computed for an estimate of the KL, for a frozen head, or twice."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    weight.requires_grad_(not is_frozen)
    targets, grad = torch.randint(0, 3, (5,)), torch.randn(5)
    made: list[str] = []

    def note(name: str) -> None:
        made_by = getattr(head, name)

        def noted(*args: Tensor) -> Any:
            made.append(name)
            return made_by(*args)

        monkeypatch.setattr(head, name, noted)

    note("product")
    note("add_product")
    with torch.no_grad():
        chunked_logprobs(hidden, weight, targets, grad_hint=grad)
    assert made == ["product"]
    made.clear()
    chunked_logprobs(hidden, weight, targets, grad_hint=grad).backward(grad)
    assert made.count("product") == 2
    assert made.count("add_product") == (0 if is_frozen else 1)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)
def test_bfloat16_is_summed_in_float32(device: str) -> None:
    """Catches log-probabilities, or sums over many chunks, that are rounded to bfloat16."""
    hidden, weight = torch.randn(50, 16).bfloat16(), torch.randn(33, 16).bfloat16()
    targets, grad = torch.randint(0, 33, (50,)).to(device), torch.randn(50).to(device)
    results = []
    for function in (
        lambda h, w: plain_logprobs(h.float(), w.float(), targets),
        lambda h, w: chunked_logprobs(h, w, targets, 1, grad),
    ):
        h, w = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
        logprobs = function(h, w)
        logprobs.backward(grad)
        assert h.grad is not None
        assert w.grad is not None
        results.append((logprobs.detach(), h.grad, w.grad))
    plain, ours = results
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    # Both round their gradients once; on CUDA ours rounds the gradient of the logits as well.
    allowed = torch.finfo(torch.bfloat16).eps * (0.1 if device == "cpu" else 1)
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert (a.float() - b.float()).norm() < allowed * b.float().norm()


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
        with Allocations() as seen:
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
