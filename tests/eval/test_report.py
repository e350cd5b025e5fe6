"""Tables and figures of finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from cfs.errors import UserError
from cfs.eval.report import compare_runs, plot_training, print_summary


def fake_run(directory: Path, method: str, tuned: float, kl: float, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    skills = {
        "copy": {"base": 0.9, "tuned": tuned, "se": 0.02},
        "word_problem": {"base": 0.0, "tuned": 0.8, "se": 0.02},
    }
    summary = {
        "method": method,
        "seed": seed,
        "steps": 2,
        "kl_nats": kl,
        "kl_se": 0.1,
        "skills": skills,
        "new_skills": ["word_problem"],
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    rows = [
        {"step": 0, "kl_nats": 0.0, "kl_se": 0.0},
        {"step": 1, "nll_task": 2.0, "nll_synthetic": None},
        {"step": 2, "nll_task": 1.0, "nll_synthetic": 1.5, "kl_nats": kl, "kl_se": 0.1},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    """Catches columns swapped between base and runs, and a new skill counted as old."""
    runs = [fake_run(tmp_path / "a", "ft", 0.1, 20.0), fake_run(tmp_path / "b", "cfs", 0.85, 2.0)]
    compare_runs(runs, tmp_path / "out", Console(quiet=True))
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == "| skill (%) | base | ft | cfs |"
    assert "| copy | 90.0 | 10.0 | 85.0 |" in lines
    assert "| word_problem (new) | 0.0 | 80.0 | 80.0 |" in lines
    assert "| mean of old | 90.0 | 10.0 | 85.0 |" in lines
    assert lines[-1] == "| KL(base || model), nats | 0 | 20.00 ± 0.10 | 2.00 ± 0.10 |"
    picture = (tmp_path / "out" / "comparison.svg").read_text()
    for word in ("base", "ft", "cfs", "copy", "accuracy (%)", "KL(base || model)"):
        assert word in picture


def test_seeds_of_a_method_are_averaged(tmp_path: Path) -> None:
    """Catches a spread of one run's items sold as a spread over seeds."""
    values = [(0.8, 2.0), (0.9, 3.0), (1.0, 4.0)]
    runs = [fake_run(tmp_path / str(i), "cfs", *v, seed=i) for i, v in enumerate(values)]
    compare_runs(runs, tmp_path / "out", Console(quiet=True))
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0] == "| skill (%) | base | cfs (3 seeds) |"
    assert "| copy | 90.0 | 90.0 ± 5.8 |" in lines
    assert lines[-1] == "| KL(base || model), nats | 0 | 3.00 ± 0.58 |"
    with pytest.raises(UserError, match="second run of cfs with seed 0"):
        compare_runs([runs[0], runs[0]], tmp_path / "out", Console(quiet=True))


def test_a_run_is_drawn_and_told(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", "cfs", 0.85, 2.0)
    plot_training(run / "metrics.jsonl", run / "training.svg")
    assert "synthetic" in (run / "training.svg").read_text()
    console = Console(record=True, quiet=True, width=100)
    print_summary(json.loads((run / "summary.json").read_text()), console)


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a finished run"):
        compare_runs([tmp_path], tmp_path / "out")
