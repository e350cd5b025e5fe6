"""The tables of a study, for people and for programs; its figures are drawn along."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cfs.eval.studies import Plan, Row, Study
from cfs.eval.study_figures import KL, PARETO, plot_kl, plot_pareto, save
from cfs.eval.study_results import (
    QUANTITIES,
    Line,
    Result,
    base_result,
    setting_of,
    study_lines,
)
from cfs.eval.study_runs import read_summary
from cfs.files import blaming, write_atomically

FORMATS = {"new_skill": (100, 1), "old_skills": (100, 1)}
"""Factor and digits that a quantity is shown with; others as they are with two digits."""

COSTS = ("time", "memory")
"""Shown without an interval: how busy the machine was is no spread of the method's."""


def report_study(study: Study, plan: Plan, out: Path, console: Console | None = None) -> None:
    """Write the table as table.md, .csv and .json, and the figures; print the table in short.

    Settings without a finished run are named under the table.
    """
    summaries = {name: read_summary(out, name) for name in plan.runs}
    lines, base = study_lines(study, plan, summaries), base_result(summaries)
    titles = ["method", "setting", "new skill (%)", "old skills (%)", "KL (nats)"]
    titles += [f"time / {study.baseline}", f"memory / {study.baseline}", "seeds"]
    rows = [["base", "", *_cells([base])[:-1], ""]]
    rows += [[line.row.label, _marked(line), *_cells(line.results)] for line in lines]
    _print_headlines(study, base, lines, console or Console())
    rule = ["---", "---", *["---:"] * (len(titles) - 2)]
    markdown = ["| " + " | ".join(cells) + " |" for cells in [titles, rule, *rows]]
    text = "\n".join([f"# {study.title}", "", *markdown, "", _notes(study, plan, lines), ""])
    with blaming(out, "free some space, and run the same command again"):
        write_atomically(out / "table.md", text)
        write_atomically(out / "table.csv", _csv(base, lines))
        content = json.dumps(_json(study, plan, base, lines), indent=2)
        write_atomically(out / "table.json", content + "\n")
        save(plot_pareto(study, base, lines), out, PARETO)
        save(plot_kl(study, lines), out, KL)
    print(f"{out}: table.md, table.csv, table.json, {PARETO}.svg, {KL}.svg and both as .png")


def _print_headlines(study: Study, base: Result, lines: list[Line], console: Console) -> None:
    """The table in short, for a terminal of 80 columns: a line for each method."""
    table = Table(title=study.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in ("new (%)", "old (%)", "KL (nats)", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("base", *_cells([base])[:-1])
    for line in lines:
        if line.is_headline:
            table.add_row(line.row.label, *_cells(line.results)[:-1])
    console.print(table)


def _marked(line: Line) -> str:
    """The setting, with an asterisk where it is one of several and stands for the method."""
    return line.setting + " *" * (line.is_headline and len(line.row.values) > 1)


def _cells(results: list[Result]) -> list[str]:
    line = Line(Row("", ""), "", True, results)
    return [*(_shown(line, quantity) for quantity in QUANTITIES), str(len(results))]


def _shown(line: Line, quantity: str) -> str:
    estimate = line.estimate(quantity)
    unit, digits = FORMATS.get(quantity, (1, 2))
    if estimate is None:
        return "-"
    mean = f"{unit * estimate.mean:.{digits}f}"
    if estimate.half_width is None or quantity in COSTS:
        return mean
    return f"{mean} ± {unit * estimate.half_width:.{digits}f}"


def _missing(study: Study, lines: list[Line]) -> list[str]:
    there = {(line.row.label, line.setting) for line in lines}
    settings = [(row.label, setting_of(row, value)) for row in study.rows for value in row.values]
    return [f"{label} ({s})" if s else label for label, s in settings if (label, s) not in there]


def _notes(study: Study, plan: Plan, lines: list[Line]) -> str:
    """Under the table: what its numbers are."""
    first, last = plan.seeds[0], plan.seeds[-1]
    seeds = f"Seed {first}" if first == last else f"Means over seeds {first} to {last}"
    notes = [
        f"{seeds}, ± half the width of the 95 % confidence interval (Student's t; none "
        "for one seed). Old skills: mean accuracy over them. KL: KL(base || model) per sequence, "
        "on held-out samples of the base.",
        f"Time and memory are those of training relative to {study.baseline} with the same seed: "
        "seconds in the training loop, the needed run's included, while other runs shared the "
        "machine, and without drawing samples; the planned peak, the larger of the two. So times "
        "are rough (their intervals are in table.csv); bench/methods.py takes steps in turns.",
        "\\* the setting that stands for the method in the figure.",
    ]
    if missing := _missing(study, lines):
        notes.append(f"Without a finished run: {', '.join(missing)}.")
    return "\n\n".join(notes)


def _csv(base: Result, lines: list[Line]) -> str:
    """A line per setting, numbers unrounded and empty where they are not known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ends = ("", "_half_width")
    columns = [f"{quantity}{end}" for quantity in QUANTITIES for end in ends]
    writer.writerow(["label", "method", "setting", "headline", "seeds", *columns])
    everything = [Line(Row("base", ""), "", False, [base]), *lines]
    for line in everything:
        cells: list[Any] = []
        for estimate in map(line.estimate, QUANTITIES):
            cells += [None, None] if estimate is None else [estimate.mean, estimate.half_width]
        count = len(line.results) if line.row.method else None
        known = [line.row.label, line.row.method, line.setting, line.is_headline, count]
        writer.writerow([*known, *cells])
    return stream.getvalue()


def _json(study: Study, plan: Plan, base: Result, lines: list[Line]) -> dict[str, Any]:
    entries = []
    for line in lines:
        estimates = {q: line.estimate(q) for q in QUANTITIES}
        entries.append(
            {
                "label": line.row.label,
                "method": line.row.method,
                "setting": line.setting,
                "headline": line.is_headline,
                **{q: None if e is None else asdict(e) for q, e in estimates.items()},
                "by_seed": [asdict(result) for result in line.results],
            }
        )
    return {
        "study": study.name,
        "title": study.title,
        "baseline": study.baseline,
        "seeds": list(plan.seeds),
        "base": {q: getattr(base, q) for q in ("new_skill", "old_skills", "skills")},
        "lines": entries,
        "missing": _missing(study, lines),
    }
