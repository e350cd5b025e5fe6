"""The measures of a sequence against matrices worked out by hand, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cfs.eval.stages import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_matrix,
    plot_stages,
    stage_table,
    write_stages,
)

NAMES = ["word_problem", "number", "rotate"]
# Row 0 is the base. The first skill recovers after stage 3, the second was known a little before.
SCORES = np.array(
    [
        [0.0, 0.1, 0.0],
        [0.9, 0.2, 0.0],
        [0.4, 1.0, 0.1],
        [0.5, 0.7, 0.8],
    ]
)
OLD_MEANS = np.array([0.9, 0.6, 0.5, 0.3])
NAN = float("nan")


def test_measures_of_three_stages() -> None:
    """Catches a row too many or too few: ACC with the base, BWT with the last skill, F without
    the best of earlier stages."""
    assert average_accuracy(SCORES) == pytest.approx((0.5 + 0.7 + 0.8) / 3)
    assert backward_transfer(SCORES) == pytest.approx(((0.5 - 0.9) + (0.7 - 1.0)) / 2)
    assert forgetting(SCORES) == pytest.approx(((0.9 - 0.5) + (1.0 - 0.7)) / 2)
    expected = [[NAN, NAN, NAN], [0.5, NAN, NAN], [0.4, 0.3, NAN]]
    np.testing.assert_allclose(forgetting_matrix(SCORES), expected)


def test_forgetting_counts_from_the_best_and_transfer_from_the_own_stage() -> None:
    """Catches F computed as -BWT: here the first skill is best after the second stage."""
    scores = np.array([[0.0, 0.0, 0.0], [0.6, 0.0, 0.0], [0.8, 0.9, 0.0], [0.7, 0.8, 1.0]])
    assert backward_transfer(scores) == pytest.approx(((0.7 - 0.6) + (0.8 - 0.9)) / 2)
    assert forgetting(scores) == pytest.approx(((0.8 - 0.7) + (0.9 - 0.8)) / 2)


def test_a_skill_better_than_ever_is_forgotten_less_than_nothing() -> None:
    """Catches a best that has the last stage in it, which Chaudhry et al. leave out, or row 0."""
    scores = np.array([[0.9, 0.0], [0.6, 0.0], [0.8, 1.0]])
    assert forgetting(scores) == pytest.approx(-0.2)
    assert backward_transfer(scores) == pytest.approx(0.2)


def test_one_stage_has_no_transfer() -> None:
    """Catches the mean of nothing."""
    scores = np.array([[0.0], [0.9]])
    assert average_accuracy(scores) == 0.9
    assert backward_transfer(scores) is None
    assert forgetting(scores) is None
    assert np.isnan(forgetting_matrix(scores)).all()


def test_table() -> None:
    """Catches rows shifted by the base's, which has no KL, and shares shown as percent."""
    assert stage_table(NAMES, SCORES, OLD_MEANS, [1.0, None, 12.345]) == [
        ["after stage", "word_problem", "number", "rotate", "mean of old", "KL (nats)"],
        ["0 (base)", "0.0", "10.0", "0.0", "90.0", ""],
        ["1 word_problem", "90.0", "20.0", "0.0", "60.0", "1.00"],
        ["2 number", "40.0", "100.0", "10.0", "50.0", ""],
        ["3 rotate", "50.0", "70.0", "80.0", "30.0", "12.35"],
        ["forgotten", "40.0", "30.0", "", "", ""],
    ]


def test_stages_are_written_and_told(tmp_path: Path) -> None:
    """Catches files that disagree with each other, and JSON that holds NaN."""
    console = Console(record=True, width=80, quiet=True)
    write_stages(tmp_path, NAMES, SCORES, OLD_MEANS, [1.0, None, 12.0], console)
    content = json.loads((tmp_path / "stages.json").read_text(), parse_constant=_refuse)
    assert content["stages"] == NAMES
    assert content["scores"] == SCORES.tolist()
    assert content["kl_nats"] == [1.0, None, 12.0]
    assert content["bwt"] == pytest.approx(-0.35)
    assert content["forgetting"] == pytest.approx(0.35)
    assert content["forgetting_matrix"][1] == [pytest.approx(0.5), None, None]
    lines = (tmp_path / "stages.md").read_text().splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert "| 2 number | 40.0 | 100.0 | 10.0 | 50.0 |  |" in lines
    measures = "(ACC) 66.7 %, backward transfer (BWT) -35.0 points, forgetting (F) 35.0 points"
    assert any(line.endswith(measures) for line in lines)
    picture = (tmp_path / "stages.svg").read_text()
    for word in ("0 (base)", "3 rotate", ">problem<", ">70.0<", "accuracy (%)", "old skills"):
        assert word in picture, word


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_one_stage_without_old_skills(tmp_path: Path) -> None:
    """Catches a table or picture that needs a second stage, or old skills that were scored."""
    scores, old_means = np.array([[0.0], [0.9]]), np.array([NAN, NAN])
    console = Console(quiet=True)
    write_stages(tmp_path, ["rotate"], scores, old_means, [None], console)
    content = json.loads((tmp_path / "stages.json").read_text(), parse_constant=_refuse)
    assert content["old_means"] == [None, None]
    assert content["bwt"] is content["forgetting"] is None
    text = (tmp_path / "stages.md").read_text()
    assert "forgotten" not in text
    assert "(BWT)" not in text


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    """Catches a date or random names in the file."""
    for name in ("a.svg", "b.svg"):
        plot_stages(NAMES, SCORES, OLD_MEANS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_percent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="shares, not percent"):
        write_stages(tmp_path, NAMES, 100 * SCORES, OLD_MEANS, [None] * 3)
