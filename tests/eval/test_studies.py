"""Studies: what is read from a file, and the runs that follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cfs.cli import parse
from cfs.eval.studies import Run, plan_runs, read_study
from cfs.train.config import TrainConfig
from tests.eval.fake_trainer import ROWS, put_in_place, run_reproduce, write_study


@pytest.fixture(autouse=True)
def _fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(tmp_path, monkeypatch)


def test_every_setting_and_seed_is_a_run(tmp_path: Path) -> None:
    """Catches a lost shared flag, a null that does not remove one, a model of another seed, and an
    interrupted study that has swept one row and not begun another."""
    study = read_study(write_study(tmp_path, ROWS))
    plan = plan_runs(study, study.scales["tiny"], range(3, 5))
    assert list(plan.runs) == [
        *("ft-3", "cfs-1-3", "merged-3", "ft-4", "cfs-1-4", "merged-4"),
        *("cfs-0.5-3", "cfs-0.5-4"),
    ]
    assert plan.runs["cfs-0.5-3"].arguments(Path("o")) == (
        "--method cfs --steps 7 --lam 0.5 --seed 3 --out o/runs/cfs-0.5-3 --resume "
        "--corpora o/corpora"
    ).split(" ")
    assert plan.runs["merged-4"].arguments(Path("o")) == (
        "--method merged --tuned o/runs/cfs-1-4/model --seed 4 --out o/runs/merged-4 --resume "
        "--corpora o/corpora"
    ).split(" ")
    assert [run.name for run in plan.selected(study, ["merged"])] == [
        *("cfs-1-3", "merged-3", "cfs-1-4", "merged-4")
    ]


def test_a_switch_and_several_values_are_flags() -> None:
    """Catches `--compile True`, and a list in one argument."""
    run = Run("a-0", "ft", {"compile": True, "wandb": False, "wise-alpha": [0.1, 0.5]}, 0)
    assert run.arguments(Path("o"))[2:6] == ["--compile", "--wise-alpha", "0.1", "0.5"]


def test_equal_settings_are_run_once(tmp_path: Path) -> None:
    """Catches work done twice for two spellings of a number, and runs merged that differ."""
    rows = [
        *ROWS[:1],
        {"label": "one", "method": "cfs", "flags": {"lam": "1e-3"}},
        {"label": "two", "method": "cfs", "sweep": {"lam": [0.001, 0.1]}, "headline": 0.1},
    ]
    study = read_study(write_study(tmp_path, rows))
    plan = plan_runs(study, {}, range(2))
    assert list(plan.runs) == ["ft-0", "one-0", "two-0.1-0", "ft-1", "one-1", "two-0.1-1"]
    assert plan.gives["two", 0.001, 1] == "one-1"
    assert plan.users("one-0") == (["one", "two"], [])


def test_the_study_of_methods_fits_train_py() -> None:
    """Catches a method, a flag or a value in the file that train.py does not take."""
    study = read_study("methods")
    plan = plan_runs(study, study.scales["tiny"], range(1))
    for run in plan.runs.values():
        config = parse(TrainConfig, "", run.arguments(Path("o")))
        assert (config.method, config.seed) == (run.method, run.seed)


ROW = {"label": "ft", "method": "ft"}


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([], {}, "expected a list of rows"),
        ([ROW, ROW], {}, "row 2 (ft): an earlier row has that label"),
        ([{"label": "a/b", "method": "ft"}], {}, "label 'a/b'"),
        ([{"label": "a"}], {}, "row 1 (a): method None"),
        ([ROW | {"flag": {}}], {}, "key 'flag' is unknown"),
        ([ROW | {"flags": {"seed": 1}}], {}, "--seed is set by reproduce.py"),
        ([ROW | {"flags": {"lam": {"a": 1}}}], {}, "--lam {'a': 1}: expected a value"),
        ([ROW | {"flags": {"lam": [None]}}], {}, "--lam [None]: expected a value"),
        ([ROW | {"flags": {"two_words": 1}}], {}, "'two_words': expected a flag"),
        ([ROW | {"needs": "cfs"}], {}, "needs 'cfs': expected the label of an earlier row"),
        ([ROW | {"sweep": {"lam": 1}, "headline": 1}], {}, "expected one flag and a list"),
        ([ROW | {"sweep": {"lam": [1, 2]}}], {}, "headline None: expected one of 1, 2"),
        ([ROW | {"sweep": {"lam": [1, 1.0]}, "headline": 1}], {}, "names a value twice"),
        ([ROW | {"sweep": {"x": [1]}, "variants": {"x": [1]}}], {}, "give one of them"),
        ([ROW | {"headline": 1}], {}, "has no sweep to choose from"),
        ([ROW], {"baseline": "other"}, "baseline 'other': expected the label of a row"),
        ([ROW], {"scales": {"paper": {}}}, "--scale tiny: study study has only paper"),
        ([ROW], {"more": 1}, "key 'more' is unknown"),
        (["ft"], {}, "row 1: 'ft': expected a mapping"),
    ],
)
def test_bad_studies_are_one_line(
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, or a run of something else than was meant."""
    file = write_study(tmp_path, rows, **changes)
    assert run_reproduce(monkeypatch, file, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no study is named; expected one of methods"),
        (["nothing"], "study 'nothing' is unknown; known: methods"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["methods", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["methods", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["methods", "--scale", "huge"], "--scale huge: expected tiny or paper"),
        (["methods", "--only", "ft", "fft"], "--only fft: study methods has no such row"),
        (["methods", "--other"], "--other"),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_reproduce(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
