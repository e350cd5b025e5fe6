"""Wise-FT is a straight line between two models, and its ends are the models themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfs.baselines import METHODS, parsed
from cfs.baselines.wise_ft import DEFAULT_ALPHA, WiseFT, average
from cfs.cli import parse, save_yaml
from cfs.errors import UserError
from cfs.model import save_model
from cfs.model.merging import merge_checkpoints
from tests.conftest import tiny_model

AWKWARD = torch.tensor([-0.0, 0.0, 1e-45, 3e38, -3e38, 0.1, float("inf"), float("nan")])
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
ALPHAS = st.floats(0, 1)


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def test_alpha_multiplies_the_original() -> None:
    """Catches Wortsman et al.'s convention, by which the sweep of Table 11 runs backwards."""
    original, tuned = torch.tensor([4.0, -8.0]), torch.tensor([8.0, 0.0])
    assert WiseFT([0.25]).merged(0, original, [tuned]).tolist() == [7.0, -2.0]


@pytest.mark.parametrize("other", [AWKWARD.flip(0), torch.full((8,), float("nan"))])
def test_the_ends_are_the_inputs_bit_for_bit(other: Tensor) -> None:
    """Catches 0 * x added at an end: it turns -0 into 0, and a NaN or infinity into NaN."""
    method = WiseFT([0.0, 1.0])
    assert bits(method.merged(1, AWKWARD, [other])) == bits(AWKWARD)
    assert bits(method.merged(0, other, [AWKWARD])) == bits(AWKWARD)


@settings(deadline=None, derandomize=True)
@given(st.lists(FINITE, min_size=1), ALPHAS)
def test_weights_that_agree_stay(values: list[float], alpha: float) -> None:
    """Catches rounding that moves frozen weights: 0.9 x + (1 - 0.9) x is not always x."""
    weights = torch.tensor(values)
    assert torch.equal(average(weights, weights.clone(), alpha), weights)


@settings(deadline=None, derandomize=True)
@given(FINITE, FINITE, ALPHAS)
def test_the_line_is_straight(original: float, tuned: float, alpha: float) -> None:
    """Catches any curve between the ends, against the formula in float64."""
    exact = alpha * original + (1 - alpha) * tuned
    value = average(torch.tensor(original), torch.tensor(tuned), alpha).item()
    assert abs(value - exact) <= 4 * torch.finfo(torch.float32).eps * (abs(original) + abs(tuned))


def test_inputs_are_left_alone() -> None:
    """Catches an average in place, which spoils the next variant of a sweep."""
    original, tuned = torch.ones(3), torch.zeros(3)
    average(original, tuned, 0.3)
    assert (original.tolist(), tuned.tolist()) == ([1.0] * 3, [0.0] * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_checkpoints_at_the_ends(dtype: torch.dtype, tmp_path: Path) -> None:
    """Catches a merge that rounds or loses something on the way to the disk and back."""
    for seed, name in enumerate(("base", "tuned")):
        save_model(tiny_model("olmo", seed), tmp_path / name, dtype)
    method = WiseFT([0.0, 1.0])
    for variant, end in enumerate(("tuned", "base")):
        out = tmp_path / method.variants()[variant]
        merge_checkpoints(
            tmp_path / "base",
            [tmp_path / "tuned"],
            out,
            lambda _, original, tuned, variant=variant: method.merged(variant, original, tuned),
        )
        assert {file.name: file.read_bytes() for file in out.iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / end).iterdir()
        }


def test_a_sweep_names_its_models() -> None:
    """Catches variants that overwrite one another."""
    assert WiseFT().variants() == [f"alpha-{DEFAULT_ALPHA}"] == ["alpha-0.5"]
    assert WiseFT([0.0, 0.1234567, 1.0]).variants() == ["alpha-0.0", "alpha-0.1234567", "alpha-1.0"]


@pytest.mark.parametrize("values", [[1.5], [0.5, -0.1], [float("nan")], [], [0.5, 0.5]])
def test_senseless_alphas_are_refused(values: list[float]) -> None:
    """Catches an extrapolation under the name of an average, and a sweep of nothing."""
    with pytest.raises(UserError, match=r"--wise-alpha .*: expected one or more .* in \[0, 1\]"):
        WiseFT(values).check()
    WiseFT().check()
    WiseFT([0.0, 0.5, 1.0]).check()


def test_one_model_is_averaged() -> None:
    """Catches all models but the first ignored in silence."""
    for tuned in ([], [torch.ones(1)] * 2):
        with pytest.raises(UserError, match=f"--tuned: {len(tuned)} models"):
            WiseFT().merged(0, torch.ones(1), tuned)


def test_only_one_method_merges() -> None:
    """Catches a combination in which one merge silently wins."""
    assert METHODS["wise-ft"] is WiseFT
    with pytest.raises(UserError, match="both decide the merge: wise-ft averages"):
        parsed("wise-ft+task-arithmetic")


def test_the_flag_takes_several_numbers(tmp_path: Path) -> None:
    """Catches numbers that stay text, and a saved config that does not read back."""
    assert parse(WiseFT, "", []).wise_alpha is None
    sweep = parse(WiseFT, "", ["--wise-alpha", "0", "0.25", "1e-3"])
    assert sweep.wise_alpha == [0.0, 0.25, 0.001]
    for method in (sweep, WiseFT()):
        save_yaml(method, tmp_path / "c.yaml", [])
        assert parse(WiseFT, "", ["--config", str(tmp_path / "c.yaml")]) == method


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["x"], "--wise-alpha x: expected float"),
        ([0.5, [1]], r"--wise-alpha \[1\]: expected float"),
        (0.5, "--wise-alpha has no list in the file"),
    ],
)
def test_a_bad_list_is_one_line(content: object, said: str, tmp_path: Path) -> None:
    """Catches a message that names no flag."""
    (tmp_path / "c.yaml").write_text(json.dumps({"wise_alpha": content}))
    with pytest.raises(UserError, match=said):
        parse(WiseFT, "", ["--config", str(tmp_path / "c.yaml")])
