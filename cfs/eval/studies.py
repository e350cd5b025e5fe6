"""Studies: a file that names settings to compare, and the training runs that follow from it.

`studies/methods.yaml` explains the keys. A *row* of the file is a method, a *setting* one point of
its sweep, a *run* one process of train.py, with one seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cfs.errors import UserError
from cfs.files import blaming

STUDIES = Path(__file__).parent / "studies"
STUDY_KEYS = ("title", "scales", "baseline", "rows")
ROW_KEYS = ("label", "method", "flags", "sweep", "variants", "headline", "needs")
RESERVED = ("config", "corpora", "method", "out", "resume", "seed", "tuned")
"""Flags that are the study's own to give."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.,-]*")

Value = str | int | float | bool
Flags = dict[str, Value | list[Value]]


@dataclass(frozen=True)
class Row:
    """One method of a study.

    flags     of all its runs; None leaves out a flag that the study's rows share
    swept     the flag that its settings differ in, None for a single setting
    values    of that flag, one a setting
    at_once   does one run take all values (`variants`), or is there a run for each (`sweep`)?
    headline  the setting that stands for the method
    needs     label of the row whose model its runs start from besides
    """

    label: str
    method: str
    flags: dict[str, Any] = field(default_factory=dict)
    swept: str | None = None
    values: tuple[Value | None, ...] = (None,)
    at_once: bool = False
    headline: Value | None = None
    needs: str | None = None

    def settings_of_runs(self) -> tuple[Value | None, ...]:
        """What tells its runs of one seed apart: the value, or None where there is one run."""
        return (None,) if self.at_once else self.values


@dataclass(frozen=True)
class Study:
    """A comparison, as its file says."""

    name: str
    title: str
    scales: dict[str, Flags]
    baseline: str
    rows: tuple[Row, ...]

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)


@dataclass(frozen=True)
class Run:
    """One process of train.py; `needs` is the name of another run."""

    name: str
    method: str
    flags: Flags
    seed: int
    needs: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides its result. Numbers are compared as numbers: 1e-3 is 0.001."""
        flags = {
            flag: [canonical(v) for v in value] if isinstance(value, list) else canonical(value)
            for flag, value in sorted(self.flags.items())
        }
        return {"method": self.method, "seed": self.seed, "flags": flags, "needs": self.needs}

    def arguments(self, out: Path) -> list[str]:
        """Of train.py; `out` is the study's directory."""
        given = ["--method", self.method]
        for flag, value in self.flags.items():
            if value is True:
                given.append(f"--{flag}")
            elif value is not False:
                values = value if isinstance(value, list) else [value]
                given += [f"--{flag}", *map(str, values)]
        if self.needs is not None:
            given += ["--tuned", str(out / "runs" / self.needs / "model")]
        given += ["--seed", str(self.seed), "--out", str(out / "runs" / self.name), "--resume"]
        return [*given, "--corpora", str(out / "corpora")]


@dataclass(frozen=True)
class Plan:
    """The runs of a study at one scale, each once, and which of them gives what.

    runs   by name, in the order in which they are begun: what a run needs comes before it
    gives  (label, setting as in `Row.settings_of_runs`, seed) -> name of the run
    """

    runs: dict[str, Run]
    gives: dict[tuple[str, Value | None, int], str]
    seeds: range

    def names(self, row: Row, seed: int) -> list[str]:
        """The runs of one row and seed."""
        return [self.gives[row.label, value, seed] for value in row.settings_of_runs()]

    def users(self, name: str) -> tuple[list[str], list[str]]:
        """Rows that a run is a result of, and runs that need its model."""
        labels = dict.fromkeys(label for (label, _, _), run in self.gives.items() if run == name)
        return list(labels), [run.name for run in self.runs.values() if run.needs == name]

    def selected(self, study: Study, labels: list[str] | None) -> list[Run]:
        """The runs of these rows, None for all, and those that they need."""
        wanted = {
            name
            for row in study.rows
            for seed in self.seeds
            for name in self.names(row, seed)
            if labels is None or row.label in labels
        }
        for run in reversed(self.runs.values()):
            if run.name in wanted and run.needs is not None:
                wanted.add(run.needs)
        return [run for run in self.runs.values() if run.name in wanted]


def plan_runs(study: Study, shared: Flags, seeds: range) -> Plan:
    """Every run of the study: of all seeds first what stands for each row, then what its sweeps
    add, so that an interrupted one has whole comparisons.

    shared  flags of all rows. Settings that are equal in all things share one run.
    """
    runs: dict[str, Run] = {}
    gives: dict[tuple[str, Value | None, int], str] = {}
    first: set[str] = set()
    for seed in seeds:
        by_settings: dict[str, str] = {}
        for row, value in ((r, v) for r in study.rows for v in r.settings_of_runs()):
            flags = {k: v for k, v in (shared | row.flags).items() if v is not None}
            if row.swept is not None:
                flags[row.swept] = list(row.values) if row.at_once else value
            needs = None
            if row.needs is not None:
                needed = study.row(row.needs)
                needs = gives[row.needs, None if needed.at_once else needed.headline, seed]
            stem = row.label if value is None else f"{row.label}-{value}"
            run = Run(f"{stem}-{seed}", row.method, flags, seed, needs)
            name = by_settings.setdefault(repr(run.settings()), run.name)
            gives[row.label, value, seed] = name
            if row.at_once or value == row.headline:
                first.add(name)
            if name == run.name and runs.setdefault(name, run) is not run:
                raise UserError(f"study {study.name}: two runs would be named {name}; rename a row")
    in_order = sorted(runs.items(), key=lambda item: item[0] not in first)
    return Plan(dict(in_order), gives, seeds)


def canonical(value: Value) -> str:
    """One text for all ways to write a number; other values as they are."""
    try:
        return repr(float(str(value)))
    except ValueError:
        return str(value)


# ------------------------------------------------------------------------------------ reading


def known_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def read_study(name: str) -> Study:
    """A study of the package by its name, or any by its file. Raises `UserError`."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if file.parent == STUDIES and name not in known_studies():
        raise UserError(
            f"study {name!r} is unknown; known: {', '.join(known_studies())}, or a FILE.yaml"
        )
    try:
        with blaming(file, "name a study or its file", "read"):
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is no YAML ({' '.join(str(error).split())})") from error
    content = _mapping(content, f"{file}", STUDY_KEYS)
    for key in STUDY_KEYS:
        if key not in content:
            raise UserError(f"{file}: lacks {key!r}; see {STUDIES / 'methods.yaml'}")
    if not isinstance(content["rows"], list) or not content["rows"]:
        raise UserError(f"{file}: rows {content['rows']!r}: expected a list of rows")
    rows: list[Row] = []
    for number, entry in enumerate(content["rows"], 1):
        rows.append(_row(entry, f"{file}: row {number}", rows))
    scales = {
        str(scale): _flags(flags, f"{file}: scale {scale}")
        for scale, flags in _mapping(content["scales"], f"{file}: scales").items()
    }
    if content["baseline"] not in [row.label for row in rows]:
        raise UserError(f"{file}: baseline {content['baseline']!r}: expected the label of a row")
    return Study(file.stem, str(content["title"]), scales, content["baseline"], tuple(rows))


def _row(entry: Any, where: str, earlier: list[Row]) -> Row:
    entry = _mapping(entry, where, ROW_KEYS)
    label, method, needs = (entry.get(key) for key in ("label", "method", "needs"))
    if not isinstance(label, str) or not NAME.fullmatch(label):
        raise UserError(f"{where}: label {label!r}: expected letters, digits and + _ . , -")
    where = f"{where} ({label})"
    if label in [row.label for row in earlier]:
        raise UserError(f"{where}: an earlier row has that label; rename one of them")
    if not isinstance(method, str):
        raise UserError(f"{where}: method {method!r}: expected a name as in train.py --method")
    if needs is not None and needs not in [row.label for row in earlier]:
        raise UserError(f"{where}: needs {needs!r}: expected the label of an earlier row")
    flags = _flags(entry.get("flags", {}), where)
    if "sweep" in entry and "variants" in entry:
        raise UserError(f"{where}: has sweep and variants; give one of them")
    if "sweep" not in entry and "variants" not in entry:
        if "headline" in entry:
            raise UserError(f"{where}: headline {entry['headline']!r}: has no sweep to choose from")
        return Row(label, method, flags, needs=needs)
    key = "sweep" if "sweep" in entry else "variants"
    swept = _flags(entry[key], f"{where}: {key}")
    if len(swept) != 1 or not all(isinstance(v, list) and v for v in swept.values()):
        raise UserError(f"{where}: {key} {entry[key]!r}: expected one flag and a list of values")
    ((flag, values),) = swept.items()
    names = [canonical(value) for value in values]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: {key} {flag} {values}: names a value twice")
    for value in values:
        if not NAME.fullmatch(str(value)):
            raise UserError(f"{where}: {key} {flag} {value!r}: cannot be part of a file name")
    if canonical(entry.get("headline")) not in names:
        raise UserError(
            f"{where}: headline {entry.get('headline')!r}: expected one of "
            f"{', '.join(map(str, values))}"
        )
    headline = values[names.index(canonical(entry["headline"]))]
    return Row(label, method, flags, flag, tuple(values), key == "variants", headline, needs)


def _mapping(content: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """`content` if it is a mapping of no other than these keys."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r}: expected a mapping of keys to values")
    for key in content:
        if keys is not None and key not in keys:
            raise UserError(f"{where}: key {key!r} is unknown; known: {', '.join(keys)}")
    return content


def _flags(content: Any, where: str) -> dict[str, Any]:
    """A mapping of flags of train.py, without their dashes, to values that a command line takes."""
    for flag, value in _mapping(content, where).items():
        if not isinstance(flag, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", flag):
            raise UserError(f"{where}: {flag!r}: expected a flag of train.py such as lora-rank")
        if flag in RESERVED:
            raise UserError(f"{where}: --{flag} is set by reproduce.py; leave it out")
        parts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(part, Value) for part in parts):
            raise UserError(f"{where}: --{flag} {value!r}: expected a value or a list of values")
    return content
