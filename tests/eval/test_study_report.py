"""The numbers of a study by hand, its tables, and what its figures say."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from rich.console import Console
from scipy import stats

from cfs.eval.studies import Plan, Row, Study, plan_runs
from cfs.eval.study_figures import plot_pareto
from cfs.eval.study_report import report_study
from cfs.eval.study_results import (
    Estimate,
    Line,
    Result,
    base_result,
    spearman,
    student_t,
    study_lines,
)

STUDY = Study(
    "small",
    "A study",
    {"tiny": {}},
    "ft",
    (
        Row("cfs", "cfs", {"lr": "3e-3"}, "lam", (0.5, 1), headline=1),
        Row("ft", "ft"),
        Row("wise-ft", "wise-ft", {}, "wise-alpha", (0.5, 0.9), True, 0.5, needs="ft"),
    ),
)


def summary(seed: int, new: float, old: tuple[float, float], **changes: Any) -> dict[str, Any]:
    skills = {
        "copy": {"base": 0.9, "tuned": old[0], "se": 0.02},
        "sort": {"base": 0.7, "tuned": old[1], "se": 0.02},
        "word_problem": {"base": 0.1, "tuned": new, "se": 0.02},
    }
    return {"seed": seed, "skills": skills, "new_skills": ["word_problem"]} | changes


def write_runs(out: Path, summaries: dict[str, dict[str, Any]]) -> None:
    for name, content in summaries.items():
        (out / "runs" / name).mkdir(parents=True)
        (out / "runs" / name / "summary.json").write_text(json.dumps(content))


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Plan, dict[str, dict[str, Any] | None]]:
    """Two seeds of every row; lam 0.5 has one, and no KL, time or memory."""
    cost = [{"train_seconds": 10.0, "plan_bytes": 100}, {"train_seconds": 20.0, "plan_bytes": 100}]
    part = summary(0, 0.5, (0.6, 0.4), kl_nats=3.0)
    variants = {"alpha-0.5": part, "alpha-0.90": summary(0, 0.2, (0.8, 0.6), kl_nats=0.5)}
    summaries: dict[str, dict[str, Any]] = {
        "ft-0": summary(0, 0.9, (0.1, 0.3), kl_nats=20.0, **cost[0]),
        "ft-1": summary(1, 0.8, (0.2, 0.4), kl_nats=24.0, **cost[1]),
        "cfs-0.5-0": summary(0, 0.85, (0.5, 0.5), kl_nats=None),
        "cfs-1-0": summary(0, 0.7, (0.8, 0.6), kl_nats=2.0, train_seconds=30.0, plan_bytes=150),
        "cfs-1-1": summary(1, 0.6, (0.8, 0.4), kl_nats=3.0, train_seconds=40.0, plan_bytes=150),
    }
    for seed in range(2):
        merge = {"steps": 0, "train_seconds": 0.0, "plan_bytes": None, "sweep": variants}
        summaries[f"wise-ft-{seed}"] = summary(seed, 0.0, (0.0, 0.0)) | merge
    write_runs(tmp_path, summaries)
    plan = plan_runs(STUDY, {}, range(2))
    return plan, {name: summaries.get(name) for name in plan.runs}


def test_the_interval_is_students() -> None:
    """Catches the normal's 1.96 where a handful of seeds calls for more, and n for n - 1."""
    for degrees in (1, 2, 4, 30):
        assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5)
    estimate = Estimate.of([1.0, 2.0, None, 6.0])
    assert estimate is not None
    assert estimate.mean == 3.0
    # By hand: squared deviations 4 + 1 + 9 over 2 is a variance of 7.
    assert estimate.half_width == pytest.approx(4.30265 * (7 / 3) ** 0.5, rel=1e-5)
    assert Estimate.of([1.0]) == Estimate(1.0, None, [1.0])
    assert Estimate.of([None]) is None


def test_ranks_share_ties() -> None:
    """Catches a correlation of values instead of ranks, and ties ranked by chance."""
    x, y = [1.0, 2.0, 2.0, 50.0, 4.0], [9.0, 8.0, 1.0, 1.0, 1.0]
    assert spearman(x, y) == pytest.approx(float(stats.spearmanr(x, y)[0]))
    assert spearman([1.0, 2.0, 3.0], [9.0, 1.0, 0.0]) == pytest.approx(-1.0)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None


def test_the_numbers_of_the_lines(
    finished: tuple[Plan, dict[str, dict[str, Any] | None]],
) -> None:
    """Catches old and new swapped, ratios of means for means of ratios, variants mixed up, and a
    merge that costs nothing because the run it needs is forgotten."""
    plan, summaries = finished
    lines = study_lines(STUDY, plan, summaries)
    assert [(line.row.label, line.setting, line.is_headline) for line in lines] == [
        ("ft", "", True),
        ("cfs", "lam 0.5, lr 3e-3", False),
        ("cfs", "lam 1, lr 3e-3", True),
        ("wise-ft", "wise-alpha 0.5", True),
        ("wise-ft", "wise-alpha 0.9", False),
    ]
    cfs = lines[2]
    assert cfs.mean("new_skill") == pytest.approx(0.65)
    assert cfs.mean("old_skills") == pytest.approx((0.7 + 0.6) / 2)
    assert cfs.mean("kl_nats") == 2.5
    assert cfs.mean("time") == pytest.approx((30 / 10 + 40 / 20) / 2)
    assert cfs.mean("memory") == pytest.approx(1.5)
    half, most = lines[3:]
    assert half.mean("new_skill") == 0.5
    assert most.mean("old_skills") == pytest.approx(0.7)
    assert most.mean("kl_nats") == 0.5
    assert (half.mean("time"), half.mean("memory")) == (1.0, 1.0)
    base = base_result(summaries)
    assert (base.new_skill, base.old_skills) == (0.1, pytest.approx(0.8))


def test_the_tables(
    tmp_path: Path, finished: tuple[Plan, dict[str, dict[str, Any] | None]]
) -> None:
    """Catches an interval shown for one seed, shares shown as percent, and a headline unmarked."""
    plan, _ = finished
    report_study(STUDY, plan, tmp_path, Console(quiet=True))
    text = (tmp_path / "table.md").read_text()
    t = 12.7062  # of one degree of freedom; the half-width for two seeds is t times half their gap
    assert text.splitlines()[2:9] == [
        "| method | setting | new skill (%) | old skills (%) | KL (nats) | time / ft | memory / ft "
        "| seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| base |  | 10.0 | 80.0 | 0.00 | - | - |  |",
        f"| ft |  | 85.0 ± {t * 5:.1f} | 25.0 ± {t * 5:.1f} | 22.00 ± {t * 2:.2f} "
        "| 1.00 | 1.00 | 2 |",
        "| cfs | lam 0.5, lr 3e-3 | 85.0 | 50.0 | - | - | - | 1 |",
        f"| cfs | lam 1, lr 3e-3 * | 65.0 ± {t * 5:.1f} | 65.0 ± {t * 5:.1f} "
        f"| 2.50 ± {t * 0.5:.2f} | 2.50 | 1.50 | 2 |",
        "| wise-ft | wise-alpha 0.5 * | 50.0 ± 0.0 | 50.0 ± 0.0 | 3.00 ± 0.00 | 1.00 | 1.00 | 2 |",
    ]
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == ["base", "ft", "cfs", "cfs", "wise-ft", "wise-ft"]
    assert float(rows[3]["new_skill"]) == pytest.approx(0.65)
    assert float(rows[3]["new_skill_half_width"]) == pytest.approx(t * 0.05, rel=1e-4)
    assert rows[2]["new_skill_half_width"] == rows[2]["kl_nats"] == ""
    assert [row["headline"] for row in rows[2:4]] == ["False", "True"]
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["lines"][2]["by_seed"][1]["skills"] == {
        "copy": 0.8,
        "sort": 0.4,
        "word_problem": 0.6,
    }
    assert content["lines"][2]["kl_nats"]["values"] == [2.0, 3.0]


def test_the_figures(
    tmp_path: Path, finished: tuple[Plan, dict[str, dict[str, Any] | None]]
) -> None:
    """Catches a figure without its names, and a correlation of other than all runs."""
    plan, _ = finished
    report_study(STUDY, plan, tmp_path, Console(quiet=True))
    pareto, kl = ((tmp_path / f"{name}.svg").read_text() for name in ("pareto", "kl"))
    for word in ("base", "ft", "cfs", "wise-ft", "new skill, accuracy (%)"):
        assert f">{word}" in pareto
    nats, old = [2, 3, 20, 24, 3, 3, 0.5, 0.5], [70, 60, 20, 30, 50, 50, 70, 70]
    expected = float(stats.spearmanr(nats, old)[0])
    assert f"8 results, one a setting and seed; Spearman's rank correlation {expected:.3f}" in kl
    for name in ("pareto", "kl"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_finished_is_still_told(tmp_path: Path) -> None:
    """Catches a crash where every run failed, or left a summary with nothing in it."""
    write_runs(tmp_path, {"ft-0": {}, "wise-ft-0": {"sweep": None, "skills": {"a": None}}})
    plan = plan_runs(STUDY, {}, range(1))
    report_study(STUDY, plan, tmp_path, Console(quiet=True))
    text = (tmp_path / "table.md").read_text()
    assert "| ft |  | - | - | - | - | - | 1 |" in text
    assert "Without a finished run: cfs (lam 0.5, lr 3e-3), cfs (lam 1, lr 3e-3)." in text


def test_names_do_not_cover_each_other() -> None:
    """Catches a figure that cannot be read where two dozen methods lie close together."""
    draws = np.random.default_rng(0)
    rows = (Row("ft", "ft"), *(Row(f"method-{i}+cfs", "cfs") for i in range(22)))
    study = Study("many", "Many", {}, "ft", rows)
    lines = []
    for row in rows:
        new, old = 0.75 + 0.1 * draws.random(), 0.5 + 0.2 * draws.random()
        lines.append(Line(row, "", True, [Result(0, new, old, 1.0, 1.0, 1.0)]))
    figure = plot_pareto(study, Result(0, 0.0, 0.9, 0.0, None, None), lines)
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if isinstance(text, Annotation)]
    labels = [text for text in texts if text.get_text().startswith(("method", "base", "ft"))]
    assert len(labels) == 24
    boxes = [text.get_window_extent(renderer) for text in labels]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
