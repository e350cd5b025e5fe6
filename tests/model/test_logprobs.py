"""The chunked head against one that holds every logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfs.model import logprobs
from cfs.model.logprobs import chunked_logprobs, plain_logprobs
from tests.conftest import tiny_model
from tests.model.allocations import LargestTensor

ROWS_PER_CHUNK = [1, 7, 64, None]


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (50, 16), weight (33, 16), targets and a gradient (50,)."""
    hidden, weight = torch.randn(50, 16), torch.randn(33, 16)
    return hidden, weight, torch.randint(0, 33, (50,)), torch.randn(50)


def value_and_gradients(
    function: object, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor
) -> list[Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs = function(h, w, targets)  # type: ignore[operator]
    return [logprobs.detach(), *torch.autograd.grad(logprobs, (h, w), grad)]


@pytest.mark.parametrize("is_hinted", [False, True])
@pytest.mark.parametrize("rows_per_chunk", ROWS_PER_CHUNK)
def test_values_and_gradients_equal_plain(rows_per_chunk: int | None, is_hinted: bool) -> None:
    """Catches a chunk boundary that drops, doubles or misplaces a row's gradient."""
    hidden, weight, targets, grad = example()
    hint = grad.clone() if is_hinted else None
    plain = value_and_gradients(plain_logprobs, hidden, weight, targets, grad)
    chunked = value_and_gradients(
        lambda h, w, t: chunked_logprobs(h, w, t, rows_per_chunk, hint),
        hidden,
        weight,
        targets,
        grad,
    )
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_per_chunk", ROWS_PER_CHUNK)
def test_a_hint_changes_no_bit(rows_per_chunk: int | None) -> None:
    """Catches gradients from a hint that is wrong, and a second backward pass that differs."""
    hidden, weight, targets, grad = example()
    hidden.requires_grad_()
    weight.requires_grad_()
    results = []
    for hint in (None, grad.clone(), grad * 2, grad.roll(1)):
        values = chunked_logprobs(hidden, weight, targets, rows_per_chunk, hint)
        for _ in range(2):
            grads = torch.autograd.grad(values, (hidden, weight), grad, retain_graph=True)
            results.append([values.detach(), *grads])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_hint_costs_nothing_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches products for gradients in an estimate of the KL, or of a frozen head."""
    hidden, weight, targets, grad = example()
    hidden.requires_grad_()
    shapes = []
    product, add_product = logprobs._product, logprobs._add_product
    monkeypatch.setattr(logprobs, "_product", lambda a, b: shapes.append("p") or product(a, b))
    monkeypatch.setattr(
        logprobs, "_add_product", lambda *abc: shapes.append("a") or add_product(*abc)
    )
    with torch.no_grad():
        chunked_logprobs(hidden, weight, targets, grad_hint=grad)
    assert shapes == ["p"]
    shapes.clear()
    chunked_logprobs(hidden, weight, targets, grad_hint=grad).backward(grad)
    assert shapes == ["p", "p"], "logits and the gradient of hidden; the head is frozen"
    shapes.clear()
    weight.requires_grad_()
    chunked_logprobs(hidden, weight, targets, grad_hint=grad).backward(grad)
    assert shapes == ["p", "a", "p"], "three products"


def test_bfloat16_is_summed_in_float32() -> None:
    """Catches log-probabilities or the head's gradient that grow coarse over many chunks."""
    hidden, weight, targets, grad = example()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = value_and_gradients(plain_logprobs, hidden.float(), weight.float(), targets, grad)
    values, grad_hidden, grad_weight = value_and_gradients(
        lambda h, w, t: chunked_logprobs(h, w, t, 1, grad), hidden, weight, targets, grad
    )
    assert values.dtype == torch.float32
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    torch.testing.assert_close(values, exact[0], rtol=1e-5, atol=1e-5)
    one_rounding = torch.finfo(torch.bfloat16).eps / 2
    for ours, theirs in ((grad_hidden, exact[1]), (grad_weight, exact[2])):
        torch.testing.assert_close(ours.float(), theirs, rtol=1.01 * one_rounding, atol=1e-5)


@pytest.mark.parametrize("is_hinted", [False, True])
def test_memory_does_not_grow_with_the_number_of_targets(is_hinted: bool) -> None:
    """Catches logits of all targets, at the vocabulary of Llama 3."""
    vocab_size, width = 128_256, 4
    largest = []
    for num_targets in (256, 1024):
        hidden = torch.randn(num_targets, width, requires_grad=True)
        weight = torch.randn(vocab_size, width, requires_grad=True)
        targets, grad = torch.randint(0, vocab_size, (num_targets,)), torch.randn(num_targets)
        hint = grad.clone() if is_hinted else None
        with LargestTensor() as largest_tensor:
            chunked_logprobs(hidden, weight, targets, grad_hint=hint).backward(grad)
        largest.append(largest_tensor.num_bytes)
    assert largest[0] == largest[1] <= 4 * logprobs.LOGITS_PER_CHUNK


@pytest.mark.gpu
@pytest.mark.parametrize("is_hinted", [False, True])
def test_tensor_cores_sum_in_float32(is_hinted: bool) -> None:
    """Catches products of bfloat16 that CUDA returns, or adds up over chunks, in bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    hidden, weight, targets, grad = (x.cuda() for x in example())
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = value_and_gradients(plain_logprobs, hidden.float(), weight.float(), targets, grad)
    hint = grad.clone() if is_hinted else None
    ours = value_and_gradients(
        lambda h, w, t: chunked_logprobs(h, w, t, 7, hint), hidden, weight, targets, grad
    )
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        assert (mine.float() - theirs).norm() < 5e-3 * theirs.norm()


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
