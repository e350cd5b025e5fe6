"""Tasks one after the other: theta* of each stage is the result of the one before."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cfs.assets import TINYWORLD_DIR
from cfs.cli import given_flags, parse
from cfs.errors import UserError
from cfs.eval.experiment import fine_tune
from cfs.eval.stages import write_stages
from cfs.files import blaming, write_atomically
from cfs.ranks import Ranks
from cfs.train.config import TINYWORLD_DEFAULTS, TrainConfig
from cfs.train.rundir import CHANGEABLE, MODEL, SUMMARY

RECORD = "flags.yaml"
"""In the directory of the stages: what each was given, and `--resume` must give again."""
FREE = {"stages", "resume", "out", "config"}
"""Flags that a sequence has for itself; any other holds for each of its stages."""
OF_ONE_BASE = ("synthetic", "tuned")
"""Flags that belong to one theta*, so that no two stages can share them."""


@dataclass(frozen=True)
class _Unchecked(TrainConfig):
    """A stage's file by itself: what it lacks may be on the command line."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Stage:
    """One run of a sequence.

    file    its YAML file
    values  the fields that are not left to their defaults
    """

    file: str
    values: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(**self.values)

    @property
    def summary(self) -> dict[str, Any]:
        file = Path(self.values["out"]) / SUMMARY
        return json.loads(file.read_text(encoding="utf-8"))


def fine_tune_in_stages(config: TrainConfig, ranks: Ranks) -> None:
    """Every stage in a run directory of its own, then the matrix of what each left. Collective.

    Flags of the command line hold for all stages; those of a stage's file win over them. With
    `--resume` the same command goes on with the stage that was at work.
    """
    stages = ranks.on_main(lambda: _begun_stages(config))
    for number, stage in enumerate(stages, start=1):
        if ranks.is_main:
            print(f"stage {number} of {len(stages)}: {stage.file}")
        if not fine_tune(stage.config, ranks, flags=set(stage.values)):
            if ranks.is_main:
                print(f"and with all {len(stages)} stages by: the same command with --resume")
            return
    if ranks.is_main:
        _report(stages, Path(str(config.out)))


def _begun_stages(config: TrainConfig) -> list[Stage]:
    """The stages, checked before the first of them begins, and recorded in `--out`."""
    if config.out is None:
        raise UserError("--stages: needs --out, the directory of the stages")
    out = Path(config.out)
    stages = _stages(config, out)
    flags = [
        {name: value for name, value in stage.values.items() if name not in CHANGEABLE}
        for stage in stages
    ]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; expected a directory")
    if not out.is_dir() or not any(path.is_file() for path in out.rglob("*")):
        with blaming(out, "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / RECORD, yaml.safe_dump(flags, sort_keys=False))
        return stages
    if not (out / RECORD).is_file():
        raise UserError(f"--out {out}: is not empty and holds no stages; choose another")
    if not config.resume:
        raise UserError(f"--out {out}: is not empty; --resume goes on there, or choose another")
    _check_same(yaml.safe_load((out / RECORD).read_text(encoding="utf-8")), flags, out)
    return stages


def _check_same(began: list[dict[str, Any]], now: list[dict[str, Any]], out: Path) -> None:
    """Raise `UserError` where the stages in `out` were begun with other flags."""
    if len(began) != len(now):
        raise UserError(
            f"--stages: {len(now)} files, but {out} began with {len(began)}; give the same, or "
            "choose another --out"
        )
    for number, (then, this) in enumerate(zip(began, now, strict=True), start=1):
        for name in then | this:
            if then.get(name) != this.get(name):
                flag = name.replace("_", "-")
                given = f"--{flag} {this[name]}" if name in this else f"no --{flag}"
                was = f"with {then[name]}" if name in then else "without it"
                raise UserError(
                    f"{given} for stage {number}: {out} began {was}; give the same flags and "
                    "files as then, or choose another --out"
                )


def _stages(config: TrainConfig, out: Path) -> list[Stage]:
    files = config.stages or []
    common = {name: getattr(config, name) for name in sorted(given_flags(TrainConfig) - FREE)}
    for name in OF_ONE_BASE if len(files) > 1 else ():
        if common.get(name) is not None:
            raise UserError(
                f"--{name}: belongs to one stage, as each starts from another model; leave it "
                "out, or write it into the file of that stage"
            )
    stages: list[Stage] = []
    for number, file in enumerate(files, start=1):
        own = _flags_in(file, is_first=number == 1)
        values = common | own
        if stages:
            values = _defaults_after(stages[0].config, values) | values
            values["model"] = str(Path(stages[-1].values["out"]) / MODEL)
        values |= {"out": str(out / f"stage-{number}"), "resume": True}
        stages.append(_checked(file, values))
    return _with_common_needs(stages)


def _flags_in(file: str, is_first: bool) -> dict[str, Any]:
    """What a stage's file gives."""
    if not Path(file).is_file():
        raise UserError(f"--stages {file}: no such file; expected a YAML file of flags")
    with blaming(Path(file), "check its permissions", "read"):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--stages {file}: is no YAML ({reason})") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--stages {file}: expected lines such as 'skill: rotate'")
    try:
        config = parse(_Unchecked, "", ["--config", file])
    except UserError as error:
        raise UserError(f"--stages {file}: {error}") from error
    named = {name.replace("-", "_") for name in content}
    for flag in sorted(named & FREE):
        raise UserError(f"--stages {file}: a stage has no {flag}; leave it out of the file")
    if not is_first and "model" in named:
        raise UserError(
            f"--stages {file}: a later stage starts from the result of the one before; leave "
            "model out of the file"
        )
    return {name: getattr(config, name) for name in sorted(named)}


def _checked(file: str, values: dict[str, Any]) -> Stage:
    stage = Stage(file, {name: value for name, value in values.items() if value is not None})
    try:
        config = stage.config
    except UserError as error:
        raise UserError(f"--stages {file}: {error}") from error
    if config.from_scratch:
        raise UserError(f"--stages {file}: --method {config.method} starts from no model")
    return stage


def _defaults_after(first: TrainConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What later stages take where nothing is said: a result of the embedded model trains like it,
    which its directory alone does not show."""
    if not first.on_embedded_model:
        return {}
    left_out = {"steps", "epochs"} if {"steps", "epochs"} & given.keys() else set()
    return {name: v for name, v in TINYWORLD_DEFAULTS.items() if name not in left_out}


def _with_common_needs(stages: list[Stage]) -> list[Stage]:
    """Every stage scores the skills of all, and `l2-init` keeps to what came before the first."""
    configs = [stage.config for stage in stages]
    skills = list(dict.fromkeys(c.skill for c in configs if c.on_tinyworld_data))
    start = configs[0].model or str(TINYWORLD_DIR)
    changed = []
    for number, (stage, config) in enumerate(zip(stages, configs, strict=True)):
        values = stage.values | ({"score_skills": list(skills)} if skills else {})
        if number and "l2-init" in config.method.split("+"):
            values = {"init_model": start} | values
        changed.append(Stage(stage.file, values))
    return changed


def _report(stages: list[Stage], out: Path) -> None:
    """Write and print the matrix; row 0 is before the first stage."""
    summaries = [stage.summary for stage in stages]
    names = [stage.config.skill for stage in stages]
    if len(set(names)) < len(names) or not all(summary["skills"] for summary in summaries):
        print(f"{out}: no matrix, which takes stages that each teach another skill of TinyWorld")
        return
    first = {name: score["base"] for name, score in summaries[0]["skills"].items()}
    rows = [first]
    rows += [{n: score["tuned"] for n, score in s["skills"].items()} for s in summaries]
    scores = np.array([[row[name] for name in names] for row in rows])
    old = [name for name in first if name not in names]
    old_means = np.array([np.mean([row[name] for name in old]) for row in rows])
    kls = [summary["kl_nats"] for summary in summaries]
    write_stages(out, names, scores, old_means, kls)
