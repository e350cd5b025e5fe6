"""The numbers of a study, from the summaries of its runs.

A number is the mean over seeds and the half-width of its 95 % confidence interval by Student's t,
which takes at least two seeds. What a summary lacks is None, as is a run that is not finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cfs.eval.studies import Plan, Row, Study, Value, canonical

CONFIDENCE = 0.95
QUANTITIES = ("new_skill", "old_skills", "kl_nats", "time", "memory")
Summary = dict[str, Any]
Summaries = dict[str, Summary | None]
"""Of the runs by name; None for one that is not finished."""


Join = Callable[[list[float]], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half_width` of its confidence interval is None for one seed."""

    mean: float
    half_width: float | None
    values: list[float]

    @classmethod
    def of(cls, values: list[float | None]) -> Estimate | None:
        """None if no seed has the number; seeds without it do not count."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        half_width = None
        if len(there) > 1:
            se = float(np.std(there, ddof=1)) / len(there) ** 0.5
            half_width = student_t(len(there) - 1) * se
        return cls(float(np.mean(there)), half_width, there)


@dataclass(frozen=True)
class Result:
    """One setting of one row with one seed; accuracies are shares, None is not known."""

    seed: int
    new_skill: float | None
    old_skills: float | None
    kl_nats: float | None
    time: float | None
    """Seconds of training over those of the baseline with the same seed."""
    memory: float | None
    """Planned peak of training over that of the baseline."""
    skills: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One line of the table: a setting with its finished seeds."""

    row: Row
    setting: str
    is_headline: bool
    results: list[Result]

    def estimate(self, quantity: str) -> Estimate | None:
        """Of one of `QUANTITIES`, over the seeds."""
        return Estimate.of([getattr(result, quantity) for result in self.results])

    def mean(self, quantity: str) -> float | None:
        estimate = self.estimate(quantity)
        return None if estimate is None else estimate.mean


def student_t(degrees: int) -> float:
    """The t that a Student-t variable's absolute value stays below with probability 95 %.

    With t = sqrt(degrees) tan(a) the density becomes cos(a)^(degrees - 1), summed here.
    """
    angle = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(degrees**0.5 * np.tan(np.interp(CONFIDENCE, mass / mass[-1], angle)))


def spearman(x: list[float], y: list[float]) -> float | None:
    """Rank correlation; ties share their mean rank. None where one of the two does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# ----------------------------------------------------------------------- from the runs' summaries


def study_lines(study: Study, plan: Plan, summaries: Summaries) -> list[Line]:
    """A line for each setting with a finished run, the baseline's row first."""
    rows = sorted(study.rows, key=lambda row: row.label != study.baseline)
    lines: list[Line] = []
    for row in rows:
        for value in row.values:
            results = [_result(study, plan, summaries, row, value, seed) for seed in plan.seeds]
            there = [result for result in results if result is not None]
            if there:
                is_headline = value == row.headline
                lines.append(Line(row, setting_of(row, value), is_headline, there))
    return lines


def base_result(summaries: Summaries) -> Result:
    """The model that all runs start from, as the first finished run scored it."""
    for summary in summaries.values():
        if summary is not None and _mean_of(summary, "base", new=False) is not None:
            new, old = (_mean_of(summary, "base", new=is_new) for is_new in (True, False))
            return Result(0, new, old, 0.0, None, None, _skills(summary, "base"))
    return Result(0, None, None, 0.0, None, None)


def setting_of(row: Row, value: Value | None) -> str:
    """In words, what the flags of the table's line are."""
    swept = {} if row.swept is None else {row.swept: value}
    flags = {flag: v for flag, v in (swept | row.flags).items() if v is not None}
    return ", ".join(f"{flag} {v}" for flag, v in flags.items())


def _result(
    study: Study,
    plan: Plan,
    summaries: Summaries,
    row: Row,
    value: Value | None,
    seed: int,
) -> Result | None:
    name = plan.gives[row.label, None if row.at_once else value, seed]
    summary = summaries[name]
    if summary is None:
        return None
    baseline = study.row(study.baseline)
    base_name = plan.gives[baseline.label, None if baseline.at_once else baseline.headline, seed]
    needs = plan.runs[name].needs
    chain = [summary] if needs is None else [summary, summaries[needs]]
    reference = summaries[base_name]
    scored = summary
    if row.at_once:
        scored = _variant(summary, row, value)
    return Result(
        seed,
        _mean_of(scored, "tuned", new=True),
        _mean_of(scored, "tuned", new=False),
        _number(scored, "kl_nats"),
        _ratio(chain, reference, "train_seconds", sum),
        _ratio(chain, reference, "plan_bytes", max),
        _skills(scored, "tuned"),
    )


def _variant(summary: Summary, row: Row, value: Value | None) -> Summary:
    """The part of a run's "sweep" about one value; its keys are such as "alpha-0.5"."""
    for key, part in _mapping(summary.get("sweep")).items():
        if isinstance(part, dict) and canonical(key.partition("-")[2]) == canonical(value or 0):
            return {"new_skills": summary.get("new_skills"), **part}
    return {}


def _ratio(
    chain: Sequence[Summary | None], reference: Summary | None, key: str, join: Join
) -> float | None:
    """What a run and the run that it needs cost together, relative to the baseline.

    One that takes no step, as merging does, costs nothing where it names no cost.
    """
    unit = _number(reference, key)
    costs = [
        0.0 if _number(one, "steps") == 0 and _number(one, key) is None else _number(one, key)
        for one in chain
    ]
    known = [cost for cost in costs if cost is not None]
    return join(known) / unit if unit and len(known) == len(costs) else None


def _mean_of(summary: Summary, which: str, new: bool) -> float | None:
    """Mean accuracy of the new skills, or of the old ones."""
    new_skills = summary.get("new_skills") or []
    values = [v for name, v in _skills(summary, which).items() if (name in new_skills) == new]
    return float(np.mean(values)) if values else None


def _skills(summary: Summary, which: str) -> dict[str, float]:
    scores = {n: _number(score, which) for n, score in _mapping(summary.get("skills")).items()}
    return {name: value for name, value in scores.items() if value is not None}


def _number(content: Any, key: str) -> float | None:
    value = _mapping(content).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if np.isfinite(value) else None


def _mapping(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
