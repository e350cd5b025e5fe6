"""The distilled head against one that holds every logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from cfs.baselines.distill import Distill, plain_token_kl
from cfs.model.kl_head import logprobs_and_kl

NUM_TARGETS, VOCAB_SIZE = 50, 33
EQUAL = 1e-6
"""Of a difference's norm, relative to the value's."""


def operands(num_targets: int = NUM_TARGETS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets and the wider teacher's hidden and weight."""
    return (
        torch.randn(num_targets, 8, requires_grad=True),
        torch.randn(VOCAB_SIZE, 8, requires_grad=True),
        torch.randint(0, VOCAB_SIZE, (num_targets,)),
        torch.randn(num_targets, 12),
        torch.randn(VOCAB_SIZE, 12),
    )


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The oracle of both results."""
    logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
    kl = plain_token_kl(hidden, weight, teacher_hidden, teacher_weight, temperature)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), kl


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rows", [1, 7, NUM_TARGETS, 64])
def test_values_and_gradients_equal_plain(rows: int, temperature: float) -> None:
    """Catches a factor T lost, a chunk dropped or doubled, and log p taken at temperature T."""
    given = operands()
    slopes = torch.randn(2, NUM_TARGETS)
    expected = plain(*given, temperature)
    expected_grads = torch.autograd.grad(expected, given[:2], tuple(slopes))
    ours = logprobs_and_kl(*given, temperature, rows)
    grads = torch.autograd.grad(ours, given[:2], tuple(slopes))
    for found, wanted in zip((*ours, *grads), (*expected, *expected_grads), strict=True):
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        assert relative_difference(found, wanted) < EQUAL


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_may_be_used_alone(used: int) -> None:
    """Catches a gradient that needs both results in the loss."""
    given = operands()
    slope = torch.randn(NUM_TARGETS)
    wanted = torch.autograd.grad(plain(*given, 2.0)[used], given[:2], slope)
    grads = torch.autograd.grad(logprobs_and_kl(*given, 2.0, 7)[used], given[:2], slope)
    for found, expected in zip(grads, wanted, strict=True):
        assert relative_difference(found, expected) < EQUAL


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_direction(temperature: float) -> None:
    """Catches KL(theta || theta*) in place of KL(theta* || theta): against torch.distributions."""
    hidden, weight, targets, teacher_hidden, teacher_weight = operands()
    student = Categorical(logits=hidden @ weight.T / temperature)
    teacher = Categorical(logits=teacher_hidden @ teacher_weight.T / temperature)
    plain_kl = plain_token_kl(hidden, weight, teacher_hidden, teacher_weight, temperature)
    _, kl = logprobs_and_kl(
        hidden, weight, targets, teacher_hidden, teacher_weight, temperature, 16
    )
    for found in (plain_kl, kl):
        assert relative_difference(found, kl_divergence(teacher, student)) < EQUAL
        assert relative_difference(found, kl_divergence(student, teacher)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_no_distance_from_itself(dtype: torch.dtype) -> None:
    """Catches a KL, or a push by it, of theta* at the start of a run: both are exactly zero."""
    hidden, weight, targets, _, _ = (
        x.detach().to(dtype) if x.is_floating_point() else x for x in operands()
    )
    student = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    _, kl = logprobs_and_kl(*student, targets, hidden, weight, 2.0, 7)
    assert not kl.any()
    for grad in torch.autograd.grad(kl.sum(), student):
        assert not grad.any()


def test_gradient_keeps_its_scale_at_high_temperature() -> None:
    """Catches a loss without T^2: the weighted gradient tends to a limit, and does not vanish."""
    given = operands()
    sizes = []
    for temperature in (100.0, 200.0):
        method = Distill(distill_temperature=temperature)
        _, kl = logprobs_and_kl(*given, temperature, 16)
        (grad,) = torch.autograd.grad(method.kl_weight * kl.sum(), given[0])
        sizes.append(float(grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_teacher_gets_no_gradient() -> None:
    """Catches a teacher that is trained along."""
    given = operands()
    teacher = [x.requires_grad_() for x in given[3:]]
    torch.cat(logprobs_and_kl(*given, 1.0, 7)).sum().backward()
    assert all(x.grad is None for x in teacher)
    assert given[0].grad is not None


def test_frozen_head() -> None:
    """Catches a gradient of the hidden states that is computed for trained heads alone."""
    hidden, weight, targets, *teacher = operands()
    wanted_kl = plain_token_kl(hidden, weight, *teacher, temperature=1.0)
    (wanted,) = torch.autograd.grad(wanted_kl.sum(), hidden)
    _, kl = logprobs_and_kl(hidden, weight.detach(), targets, *teacher, temperature=1.0, rows=7)
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    assert relative_difference(grad, wanted) < EQUAL


def test_no_targets() -> None:
    """Catches NaN, or a missing gradient, of a micro-batch in which nothing is a target."""
    given = operands(num_targets=0)
    results = logprobs_and_kl(*given, 1.0, 7)
    assert [tuple(x.shape) for x in results] == [(0,), (0,)]
    grad_hidden, grad_weight = torch.autograd.grad(torch.cat(results).sum(), given[:2])
    assert grad_hidden.shape == (0, 8)
    assert not grad_weight.any()


def test_bfloat16_weights_are_summed_in_float32() -> None:
    """Catches dW added up in bfloat16 chunk by chunk: the error is that of one rounding."""
    hidden, weight, targets, *teacher = operands(num_targets=2000)
    half = [x.detach().bfloat16() for x in (hidden, weight, *teacher)]
    h, w = (x.requires_grad_() for x in half[:2])
    results = logprobs_and_kl(h, w, targets, *half[2:], temperature=1.0, rows=1)
    grads = torch.autograd.grad(torch.cat(results).sum(), (h, w))
    exact = [x.detach().double().requires_grad_() for x in half]
    logits = exact[0] @ exact[1].T
    loss = logits.log_softmax(-1).gather(-1, targets[:, None]).sum()
    theirs = Categorical(logits=exact[2] @ exact[3].T)
    loss = loss + kl_divergence(theirs, Categorical(logits=logits)).sum()
    for found, wanted in zip(grads, torch.autograd.grad(loss, exact[:2]), strict=True):
        assert found.dtype == torch.bfloat16
        rounding = relative_difference(wanted.bfloat16(), wanted)
        assert relative_difference(found, wanted) < 1.01 * rounding
