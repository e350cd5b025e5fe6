"""What runs did, as tables for people and as figures.

    python -m cfs.eval.report RUN [RUN ...] --out DIR

holds finished runs of one base side by side, averaging the seeds of a method: comparison.md,
comparison.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cfs.cli import run
from cfs.errors import UserError

# Tell runs apart in colour (Okabe-Ito), and bars by hatch where there is none.
COLOURS = ("#999999", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
HATCHES = ("", "//", "", "..", "\\\\", "xx")
matplotlib.rcParams |= {"svg.hashsalt": "cfs", "svg.fonttype": "none", "font.size": 9}


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """The table a run ends with: each skill before and after, then the KL."""
    console = console or Console()
    title = f"{summary['method']}, {summary['steps']} steps"
    if "sweep" in summary:
        title = f"{summary['method']}, {next(iter(summary['sweep']))} (in model/)"
    table = Table(title=title, title_justify="left")
    table.add_column("skill")
    for column in ("base", "tuned", "± se"):
        table.add_column(column, justify="right")
    for name, new in _ordered_skills([summary]):
        score = summary["skills"][name]
        label = f"{name} (new)" if new else name
        table.add_row(label, *(_percent(score[key]) for key in ("base", "tuned", "se")))
    if summary["skills"]:
        console.print(table)
    if "sweep" in summary:
        _print_sweep(summary, console)
    if summary["kl_nats"] is not None:
        console.print(
            f"KL(base || tuned) = {summary['kl_nats']:.3f} ± {summary['kl_se']:.3f} nats per "
            "sequence (standard error; held-out samples at temperature 1, top-p 1)",
            highlight=False,
            soft_wrap=True,
        )


def _print_sweep(summary: dict[str, Any], console: Console) -> None:
    """A line for each model of a sweep; the first is the run's own."""
    table = Table(title="each model", title_justify="left")
    for column in ("model", "new (%)", "mean of old (%)", "KL (nats)"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for variant, found in summary["sweep"].items():
        shares = {name: score["tuned"] for name, score in found["skills"].items()}
        new = [share for name, share in shares.items() if name in summary["new_skills"]]
        old = [share for name, share in shares.items() if name not in summary["new_skills"]]
        means = [_percent(float(np.mean(part))) if part else "" for part in (new, old)]
        kl = "" if found["kl_nats"] is None else f"{found['kl_nats']:.3f} ± {found['kl_se']:.3f}"
        table.add_row(variant, *means, kl)
    console.print(table)


def print_methods(methods: Mapping[str, Any], console: Console | None = None) -> None:
    """Every method with a line on each; they are `cfs.baselines.METHODS`."""
    console = console or Console()
    table = Table(title="Methods of train.py --method", title_justify="left", box=None)
    table.add_column("name", no_wrap=True)
    table.add_column("what it does")
    for name, method in methods.items():
        table.add_row(name, f"{method.summary}. {method.source}")
    console.print(table)
    console.print(
        "\nThose that go together are joined by '+', such as l2+cfs. train.py --help has the "
        "options of each, docs/methods.md formula, settings and cost.",
        highlight=False,
    )


def plot_training(metrics_file: Path, out: Path) -> None:
    """Both loss terms and the KL over the steps of one run."""
    rows = _read_metrics(metrics_file)
    figure = Figure(figsize=(8, 3), layout="constrained")
    losses, divergence = figure.subplots(1, 2)
    for key, label, colour in (
        ("nll_task", "task", COLOURS[1]),
        ("nll_synthetic", "synthetic", COLOURS[2]),
    ):
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1)
    losses.set(xlabel="step", ylabel="loss (nats per target)")
    losses.legend(frameon=False)
    _plot_kl(divergence, rows, "", COLOURS[2])
    _save(figure, out)


def compare_runs(runs: list[Path], out: Path, console: Console | None = None) -> None:
    """The base and each method side by side, as a table and as a picture.

    Runs of one method are seeds of it: shown as their mean and its standard error.
    """
    methods = _by_method(runs)
    lines = _comparison_rows(methods)
    table = Table(*lines[0])
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines[1:]:
        table.add_row(*line)
    (console or Console()).print(table)
    out.mkdir(parents=True, exist_ok=True)
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    (out / "comparison.md").write_text(markdown + "\n", encoding="utf-8")

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    bars, divergence = figure.subplots(1, 2, width_ratios=(2, 1))
    _plot_skills(bars, methods)
    for (name, summaries), colour in zip(methods.items(), COLOURS[1:], strict=False):
        for i, summary in enumerate(summaries):
            label = name if i == 0 else ""
            _plot_kl(divergence, _read_metrics(summary["run"] / "metrics.jsonl"), label, colour)
    divergence.legend(frameon=False)
    _save(figure, out / "comparison.svg")


def _by_method(runs: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """The runs' summaries by method, in the order given; refuses what cannot be compared."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for directory in runs:
        summary: dict[str, Any] = {**_read_summary(directory), "run": directory}
        same = methods.setdefault(summary["method"], [])
        if summary["seed"] in [other["seed"] for other in same]:
            raise UserError(
                f"{directory}: a second run of {summary['method']} with seed {summary['seed']}; "
                "runs of one method are averaged over seeds"
            )
        if any(score["base"] is None for score in summary["skills"].values()):
            raise UserError(f"{directory}: began from random weights and has no base to compare")
        same.append(summary)
    if len(methods) >= len(COLOURS):
        raise UserError(f"{len(methods)} methods: a figure tells {len(COLOURS) - 1} apart")
    return methods


def _comparison_rows(methods: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    def named(name: str, count: int) -> str:
        return name if count == 1 else f"{name} ({count} seeds)"

    rows = [["skill (%)", "base", *(named(m, len(s)) for m, s in methods.items())]]
    everything = [summary for summaries in methods.values() for summary in summaries]
    skills = _ordered_skills(everything)
    for name, new in skills:
        cells = [_percents([summary["skills"][name]["base"] for summary in everything[:1]])]
        for summaries in methods.values():
            cells.append(_percents([summary["skills"][name]["tuned"] for summary in summaries]))
        rows.append([f"{name} (new)" if new else name, *cells])
    old = [name for name, new in skills if not new]
    if old:
        cells = [_percents([_old_mean(everything[0], old, "base")])]
        for summaries in methods.values():
            cells.append(_percents([_old_mean(summary, old, "tuned") for summary in summaries]))
        rows.append(["mean of old", *cells])
    rows.append(["KL(base || model), nats", "0", *map(_nats, methods.values())])
    return rows


def _old_mean(summary: dict[str, Any], old: list[str], key: str) -> float:
    return float(np.mean([summary["skills"][name][key] for name in old]))


def _plot_skills(axes: Axes, methods: dict[str, list[dict[str, Any]]]) -> None:
    """Bars per skill: the base, then each method's mean over seeds with its standard error."""
    everything = [summary for summaries in methods.values() for summary in summaries]
    skills = _ordered_skills(everything)
    groups = [("base", "base", everything[:1])]
    groups += [(name, "tuned", summaries) for name, summaries in methods.items()]
    places = np.arange(len(skills))
    width = 0.8 / len(groups)
    for i, (name, key, summaries) in enumerate(groups):
        scores = [[100 * s["skills"][skill][key] for s in summaries] for skill, _ in skills]
        bars = axes.bar(
            places + (i - (len(groups) - 1) / 2) * width,
            [np.mean(values) for values in scores],
            width,
            yerr=[_se(values) for values in scores] if len(summaries) > 1 else None,
            label=name,
            color=COLOURS[i],
        )
        for bar in bars:
            bar.set(hatch=HATCHES[i], edgecolor="white")
    labels = [f"{skill}\n(new)" if new else skill for skill, new in skills]
    axes.set_xticks(places, [label.replace("_", "\n", 1) for label in labels])
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _plot_kl(axes: Axes, rows: list[dict[str, Any]], label: str, colour: str) -> None:
    points = [(r["step"], r["kl_nats"], r["kl_se"]) for r in rows if "kl_nats" in r]
    if points:
        step, nats, se = (np.array(column) for column in zip(*points, strict=True))
        axes.plot(step, nats, label=label, color=colour, marker=".", linewidth=1)
        axes.fill_between(step, nats - se, nats + se, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="KL(base || model), nats per sequence")
    axes.set_ylim(bottom=min(0.0, *(p[1] for p in points), axes.get_ylim()[0]) if points else 0)
    axes.spines[["top", "right"]].set_visible(False)


def _ordered_skills(summaries: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Skills that every run has, old ones first, each with whether it is new."""
    new = set(summaries[0]["new_skills"])
    common = set.intersection(*(set(s["skills"]) for s in summaries))
    return [(name, name in new) for name in sorted(common, key=lambda n: (n in new, n))]


def _se(values: list[float]) -> float:
    """Standard error of the mean over seeds."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _percents(shares: list[float]) -> str:
    mean = f"{100 * float(np.mean(shares)):.1f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * _se(shares):.1f}"


def _nats(summaries: list[dict[str, Any]]) -> str:
    """One run: its estimate and the estimate's own error. Several: mean and error over seeds."""
    values = [summary["kl_nats"] for summary in summaries]
    error = summaries[0]["kl_se"] if len(values) == 1 else _se(values)
    return f"{float(np.mean(values)):.2f} ± {error:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _read_summary(directory: Path) -> dict[str, Any]:
    file = directory / "summary.json"
    if not file.is_file():
        raise UserError(f"{file}: not there; expected a finished run of train.py")
    return json.loads(file.read_text(encoding="utf-8"))


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold finished runs of one base side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of train.py")
    parser.add_argument("--out", type=Path, required=True, help="where the comparison goes")
    arguments = parser.parse_args()
    compare_runs(arguments.runs, arguments.out)
    print(f"{arguments.out}: comparison.md, comparison.svg")


if __name__ == "__main__":
    run(main)
