"""The two l2 penalties as methods; the distance alone is in tests/train/test_reference.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.baselines import METHODS, Method
from cfs.baselines.l2 import L2, L2Init
from cfs.errors import UserError
from cfs.model import load_model
from cfs.train.config import TrainConfig
from cfs.train.loop import train
from tests.baselines.lockstep import lone_setting, lone_shard
from tests.conftest import read_metrics
from tests.train.runs import base_model, make_run, same, tuned_model, weights

REFUSE_L2 = {"lora", "hma", "pretrain"}
"""What `--l2` cannot join."""


def after_backward(
    method: Method, here: Tensor, anchor: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The penalty that a method reports for one parameter, and the gradient that it leaves."""
    shard = lone_shard("w", here)
    shard.parameter.grad = grad.clone()
    setting = lone_setting([shard], [anchor], [])
    setting.initial.append(anchor)
    method.begin(setting)
    penalty = method.before_step(0)
    assert penalty is not None
    assert penalty.dtype == torch.float64
    return penalty, shard.parameter.grad


@pytest.mark.parametrize("method", [L2(l2=0.25), L2Init(l2_init=0.25)])
def test_penalty_and_gradient_by_hand(method: Method) -> None:
    """Catches lambda lost from the reported penalty or taken twice, and a half of it."""
    here, anchor = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, 5.0])
    penalty, grad = after_backward(method, here, anchor, torch.tensor([10.0, 10.0, 10.0]))
    assert penalty.item() == 0.25 * (1 + 4)
    assert grad.tolist() == [10.5, 9.0, 10.0]


@pytest.mark.parametrize("method", [L2(l2=0.3), L2Init(l2_init=0.3)])
def test_the_gradient_is_that_of_the_penalty(method: Method) -> None:
    """Catches a reported penalty and an added gradient of two different functions."""
    here, anchor, grad = torch.randn(3, 7, 5)
    penalty, found = after_backward(method, here, anchor, grad)
    wide = here.double().requires_grad_()
    expected = 0.3 * (wide - anchor.double()).square().sum()
    (slope,) = torch.autograd.grad(expected, wide)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found.double(), grad.double() + slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["l2", "l2-init"])
def test_the_first_step_of_a_run_is_plain_fine_tunings(method: str, tmp_path: Path) -> None:
    """Catches an anchor that is not where the masters start; zero penalty must mean zero slope."""
    run = make_run(tmp_path, "run", method=method, l2=None)
    grads = [torch.randn_like(shard.local) for shard in run.shards]
    for shard, grad in zip(run.shards, grads, strict=True):
        shard.parameter.grad = grad.clone()
    penalty = run.methods[0].before_step(0)
    assert penalty is not None
    assert penalty.item() == 0.0
    for shard, grad in zip(run.shards, grads, strict=True):
        assert torch.equal(shard.parameter.grad, grad), shard.name  # type: ignore[arg-type]


def test_a_run_reports_the_penalty_and_adds_it_to_the_loss(tmp_path: Path) -> None:
    """Catches a penalty in the gradient that the loss in metrics.jsonl does not have."""
    place, flags = tmp_path, {"steps": 2, "clip": 0.0}
    train(make_run(place, "plain", method="ft", l2=None, **flags))
    run = make_run(place, "l2", method="l2", l2=3.0, **flags)
    assert not train(make_run(place, "one", method="l2", l2=3.0, stop_after=1, **flags))
    train(run)
    plain, pulled = read_metrics(place / "plain"), read_metrics(place / "l2")
    assert pulled[1]["l2_penalty"] == 0.0
    assert pulled[1]["loss"] == plain[1]["loss"]
    base = load_model(base_model(place))
    moved = weights(make_run(place, "one", method="l2", l2=3.0, **flags))
    start = {name: value.detach() for name, value in base.named_parameters()}
    distance = sum((moved[name] - start[name]).double().square().sum() for name in start)
    assert pulled[2]["l2_penalty"] == pytest.approx(3.0 * float(distance), rel=1e-6)
    assert pulled[2]["loss"] == pytest.approx(plain[2]["loss"] + pulled[2]["l2_penalty"], rel=1e-6)


def test_l2_init_is_l2_in_a_run_on_one_task(tmp_path: Path) -> None:
    """Catches an initialisation that is not the model the run starts from, where none is named."""
    l2 = make_run(tmp_path, "l2", method="l2", l2=0.5, steps=4)
    init = make_run(tmp_path, "init", method="l2-init", l2=None, l2_init=0.5, steps=4)
    ft = make_run(tmp_path, "ft", method="ft", l2=None, steps=4)
    for run in (l2, init, ft):
        train(run)
    assert same(weights(l2), weights(init))
    assert not same(weights(l2), weights(ft))


def test_l2_init_pulls_towards_init_model(tmp_path: Path) -> None:
    """Catches `--init-model` unread: the anchor would be the stage's own start, as for l2."""
    other = tuned_model(tmp_path)
    changes = {"method": "l2-init", "l2": None, "l2_init": 0.5, "steps": 2}
    run = make_run(tmp_path, "run", init_model=str(other), **changes)
    start, anchor = weights(run), dict(load_model(other).named_parameters())
    distance = sum((start[name] - anchor[name].detach()).double().square().sum() for name in start)
    train(run)
    metrics = read_metrics(tmp_path / "run")
    assert metrics[1]["l2-init_penalty"] == pytest.approx(0.5 * float(distance), rel=1e-6)
    same_start = make_run(tmp_path, "l2", **changes)
    train(same_start)
    assert not same(weights(run), weights(same_start))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "l2"])
def test_the_flag_joins_every_method_that_moves_the_weights(method: str) -> None:
    """Catches `--l2` dropped in silence, doubled, or refused beside plain fine-tuning."""
    if method in REFUSE_L2:
        with pytest.raises(UserError, match=rf"--method {method}\+l2"):
            TrainConfig(method=method, l2=0.25)
        return
    found = TrainConfig(method=method, l2=0.25).methods
    assert [m.l2 for m in found if isinstance(m, L2)] == [0.25]
    assert [m.name for m in found if m.name != "l2"] == ([] if method == "ft" else [method])


def test_the_flag_on_ft_is_the_method_l2(tmp_path: Path) -> None:
    """Catches two spellings of the paper's baseline that train differently."""
    runs = [make_run(tmp_path, name, method=name, l2=0.5, steps=3) for name in ("ft", "l2")]
    for run in runs:
        train(run)
    assert same(*map(weights, runs))


def test_a_weight_of_zero_joins_nothing() -> None:
    """Catches theta* kept in memory for a penalty that is always zero."""
    assert [m.name for m in TrainConfig(method="cfs", l2=0.0).methods] == ["cfs"]
