"""The schedule and what it is applied to."""

from __future__ import annotations

import pytest
import torch

from cfs.train.loop import clip_gradients
from cfs.train.optim import cosine_lr, make_adamw
from tests.conftest import tiny_model


def test_schedule() -> None:
    """Catches a first step at zero, a peak never reached, a last step that is not small."""
    rates = [cosine_lr(step, 100, 2.0, 0.03) for step in range(100)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert max(rates) == rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert cosine_lr(0, 1, 2.0, 0.03) == 2.0, "a run of one step does something"
    assert cosine_lr(51, 100, 2.0, 0.02) == pytest.approx(1.0)


def test_gains_do_not_decay() -> None:
    """Catches weight decay that pulls RMSNorm's gains to zero."""
    model = tiny_model("llama")
    optimizer = make_adamw(model, 1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


@pytest.mark.parametrize("largest", [0.5, 0.0, 1e9])
def test_clipping(largest: float) -> None:
    """Catches a norm per tensor, a clip that scales up, and 0 that zeroes."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert clip_gradients(model, largest) == pytest.approx(float(before.norm()), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    expected = before * 0.5 / before.norm() if largest == 0.5 else before
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
