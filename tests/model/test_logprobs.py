"""The chunked head against one that holds every logit."""

from __future__ import annotations

import pytest
import torch

from cfs.model.logprobs import chunked_logprobs, plain_logprobs
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
