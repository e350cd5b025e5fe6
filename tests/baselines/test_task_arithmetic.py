"""Task vectors add up, cancel, and with one model lie on the line of Wise-FT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfs.baselines import METHODS
from cfs.baselines.task_arithmetic import DEFAULT_SCALE, TaskArithmetic, added
from cfs.baselines.wise_ft import DEFAULT_ALPHA, average
from cfs.cli import parse
from cfs.errors import UserError
from cfs.model import save_model
from cfs.model.merging import merge_checkpoints
from tests.conftest import tiny_model

AWKWARD = torch.tensor([-0.0, 0.0, 1e-45, 3e38, -3e38, 0.1, float("inf"), float("nan")])
WEIGHTS = st.integers(-64, 64).map(lambda number: number / 16)  # sums of them are exact
SCALES = st.integers(-16, 16).map(lambda number: number / 8)


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def test_a_case_by_hand() -> None:
    """Catches a mean of the task vectors, or models added instead of their changes."""
    original = torch.tensor([1.0, 2.0])
    tuned = [torch.tensor([3.0, 2.0]), torch.tensor([2.0, -2.0])]
    method = TaskArithmetic([0.5, 2.0, -1.0])  # of the sum, [3, -4]
    assert method.merged(0, original, tuned).tolist() == [2.5, 0.0]
    assert method.merged(1, original, tuned).tolist() == [7.0, -6.0]
    assert method.merged(2, original, tuned).tolist() == [-2.0, 6.0]


@pytest.mark.parametrize("other", [AWKWARD.flip(0), torch.full((8,), float("nan"))])
def test_the_ends_are_the_inputs_bit_for_bit(other: Tensor) -> None:
    """Catches a sum computed where it counts nothing or all: it turns -0 into 0, or into NaN."""
    method = TaskArithmetic([0.0, 1.0])
    assert bits(method.merged(0, AWKWARD, [other, other])) == bits(AWKWARD)
    assert bits(method.merged(1, other, [AWKWARD])) == bits(AWKWARD)


@settings(deadline=None, derandomize=True)
@given(WEIGHTS, WEIGHTS, SCALES, SCALES)
def test_scales_and_vectors_cancel(original: float, change: float, scale: float, to: float) -> None:
    """Catches a sign or a base that drifts: what is added and taken away again leaves theta*."""
    star, there, back = (torch.tensor([original + step]) for step in (0.0, change, -change))
    assert torch.equal(added(star, [there, back], scale), star)
    assert torch.equal(added(star, [star.clone()], scale), star)
    moved = added(star, [there], scale)
    assert torch.equal(added(moved, [moved + there - star], -scale), star)
    both = added(star, [there, there, back], to)
    assert torch.equal(both, added(star, [there], to))


@settings(deadline=None, derandomize=True)
@given(WEIGHTS, WEIGHTS, SCALES)
def test_one_model_walks_the_line_of_wise_ft(original: float, tuned: float, scale: float) -> None:
    """Catches a scale that runs the wrong way; beyond the ends the same line goes on."""
    star, there = torch.tensor([original]), torch.tensor([tuned])
    assert torch.equal(added(star, [there], scale), average(star, there, 1 - scale))


def test_the_defaults_meet() -> None:
    """Catches a default that says it is Wise-FT's and is not."""
    assert DEFAULT_SCALE == 1 - DEFAULT_ALPHA


def test_inputs_are_left_alone() -> None:
    """Catches a sum in place, which spoils the next variant of a sweep."""
    original, tuned = torch.ones(3), [torch.zeros(3), torch.full((3,), 5.0)]
    added(original, tuned, 0.3)
    assert original.tolist() == [1.0] * 3
    assert [value.tolist() for value in tuned] == [[0.0] * 3, [5.0] * 3]


def test_whole_checkpoints(tmp_path: Path) -> None:
    """Catches models that the merge and the method number differently."""
    for seed, name in enumerate(("base", "one", "two")):
        save_model(tiny_model("llama", seed), tmp_path / name)
    method = TaskArithmetic([1.0])
    merge_checkpoints(
        tmp_path / "base",
        [tmp_path / "one", tmp_path / "two"],
        tmp_path / "out",
        lambda _, original, tuned: method.merged(0, original, tuned),
    )
    expected = tiny_model("llama", 0)
    others = zip(tiny_model("llama", 1).parameters(), tiny_model("llama", 2).parameters())  # noqa: B905
    with torch.no_grad():
        for star, (one, two) in zip(expected.parameters(), others, strict=True):
            star.copy_(((one - star) + (two - star)) + star)
    save_model(expected, tmp_path / "expected")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "expected" / "model.safetensors"
    ).read_bytes()


def test_a_sweep_names_its_models() -> None:
    """Catches variants that overwrite one another."""
    assert TaskArithmetic().variants() == ["scale-0.5"]
    assert TaskArithmetic([-0.5, 2.0]).variants() == ["scale--0.5", "scale-2.0"]


@pytest.mark.parametrize("values", [[float("inf")], [0.5, float("nan")], [], [1.0, 1.0]])
def test_senseless_scales_are_refused(values: list[float]) -> None:
    """Catches a model of NaNs, and a sweep of nothing."""
    with pytest.raises(UserError, match=r"--task-scale .*: expected one or more .* finite"):
        TaskArithmetic(values).check()
    TaskArithmetic().check()
    TaskArithmetic([-1.0, 0.0, 3.0]).check()


def test_no_model_is_refused() -> None:
    """Catches theta* itself given out as a result."""
    with pytest.raises(UserError, match="--tuned: no model"):
        TaskArithmetic().merged(0, torch.ones(1), [])


def test_the_flag_takes_negative_numbers() -> None:
    """Catches a scale below zero that is read as another flag."""
    assert METHODS["task-arithmetic"] is TaskArithmetic
    assert parse(TaskArithmetic, "", ["--task-scale", "-0.5", "2"]).task_scale == [-0.5, 2.0]
