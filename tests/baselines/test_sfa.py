"""Where SFA averages, and what an average leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cfs.baselines.sfa import SFA
from cfs.errors import UserError
from cfs.model import load_model
from cfs.train.loop import train
from tests.baselines.lockstep import lone_setting, lone_shard
from tests.train.cut import CutShard
from tests.train.runs import base_model, make_run, same, weights


def begun(
    here: torch.Tensor, star: torch.Tensor, num_steps: int, **options: float
) -> tuple[SFA, CutShard]:
    """A method that has begun on one parameter."""
    shard = lone_shard("w", here)
    method = SFA(**options)
    method.begin(replace(lone_setting([shard], [star], []), num_steps=num_steps))
    return method, shard


def boundaries(every: float, num_steps: int) -> list[int]:
    """Numbers of steps after which the weights were averaged."""
    method, shard = begun(torch.ones(1), torch.zeros(1), num_steps, sfa_every=every, sfa_beta=1.0)
    found = []
    for step in range(num_steps):
        shard.local.fill_(1.0)
        method.after_step(step)
        if shard.local.item() == 0.0:
            found.append(step + 1)
    return found


@pytest.mark.parametrize(
    ("every", "num_steps", "expected"),
    [
        (0.25, 8, [2, 4, 6]),
        (0.25, 10, [2, 4, 6, 8]),  # int(2.5)
        (0.3, 10, [3, 6, 9]),
        (0.5, 7, [3, 6]),
        (0.1, 5, [1, 2, 3, 4]),  # a period of one step at least
        (0.9, 10, [9]),
        (0.5, 1, []),
    ],
)
def test_boundaries_by_hand(every: float, num_steps: int, expected: list[int]) -> None:
    """Catches steps counted from 0, a period rounded up, a period of 0, and an average at the very
    end, which would be Wise-FT on top."""
    assert boundaries(every, num_steps) == expected


def test_beta_is_the_share_of_the_original() -> None:
    """Catches beta on the other side."""
    method, shard = begun(torch.tensor([4.0, 8.0]), torch.tensor([0.0, 16.0]), 4, sfa_beta=0.25)
    method.after_step(0)
    assert shard.local.tolist() == [3.0, 10.0]


def test_beta_1_puts_the_original_back_exactly() -> None:
    """Catches here + (star - here), which rounds where the two differ in magnitude."""
    star = torch.randn(1000) * torch.logspace(-6, 6, 1000)
    method, shard = begun(torch.randn(1000), star, 2, sfa_every=0.5, sfa_beta=1.0)
    method.after_step(0)
    assert torch.equal(shard.local, star)


def test_what_did_not_move_is_not_moved_by_an_average() -> None:
    """Catches the rounding of two products, beta star + (1 - beta) here, in weights that agree."""
    star = torch.randn(1000)
    for beta in (0.1, 0.5, 0.7):
        method, shard = begun(star, star, 4, sfa_beta=beta)
        method.after_step(0)
        assert torch.equal(shard.local, star)


@pytest.mark.parametrize(
    ("masters", "original", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, [129.0, 2.0]),  # rounded once, from 128.504
        (torch.float32, torch.bfloat16, [128.50390625, 2.0]),
        (torch.float32, torch.float32, [128.50390625, 2.0]),
    ],
)
def test_averages_are_computed_in_float32(
    masters: torch.dtype, original: torch.dtype, expected: list[float]
) -> None:
    """Catches a difference that is rounded to bfloat16 before it is halved: that gives 128."""
    here = torch.tensor([256.0, 3.0], dtype=masters)
    star = torch.tensor([1.0078125, 1.0], dtype=original)
    method, shard = begun(here, star, 4, sfa_beta=0.5)
    method.after_step(0)
    assert shard.local.dtype == masters
    assert shard.local.tolist() == expected


def test_beta_0_trains_as_plain_fine_tuning(tmp_path: Path) -> None:
    """Catches an average that touches weights it should leave, bit for bit."""
    flags = {"l2": None, "steps": 8}
    ft = make_run(tmp_path, "ft", method="ft", **flags)
    sfa = make_run(tmp_path, "sfa", method="sfa", sfa_beta=0.0, **flags)
    train(ft)
    train(sfa)
    assert same(weights(ft), weights(sfa))


@pytest.mark.parametrize("masters", ["float32", "bfloat16"])
def test_a_run_is_back_at_the_original_at_a_boundary(masters: str, tmp_path: Path) -> None:
    """Catches rows of another parameter, an average before the step, and theta* taken late."""
    base = load_model(base_model(tmp_path), getattr(torch, masters))
    original = {name: value.detach() for name, value in base.named_parameters()}
    flags = {"l2": None, "steps": 4, "sfa_every": 0.5, "sfa_beta": 1.0, "masters": masters}
    flags |= {"dtype": masters}
    back = []
    for stop_after in (1, 2, 3, None):
        run = make_run(tmp_path, f"{stop_after}", method="sfa", stop_after=stop_after, **flags)
        train(run)
        back.append(same(weights(run), original))
    assert back == [False, True, False, False]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"sfa_every": 0.0}, "--sfa-every 0.0"),
        ({"sfa_every": 1.0}, "--sfa-every 1.0"),
        ({"sfa_beta": 1.1}, "--sfa-beta 1.1"),
        ({"sfa_beta": float("nan")}, "--sfa-beta nan"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], flag: str) -> None:
    """Catches a run that never averages, or that leaves the line between the two models."""
    with pytest.raises(UserError, match=f"{flag}: expected in"):
        SFA(**options).check()
