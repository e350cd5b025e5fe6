"""Tasks one after the other: theta* of each stage is the result of the one before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from cfs.assets import TINYWORLD_DIR
from cfs.cli import given_flags, parse
from cfs.errors import UserError
from cfs.eval.experiment import fine_tune
from cfs.eval.stages import write_stages
from cfs.ranks import Ranks
from cfs.train.config import TINYWORLD_DEFAULTS, TrainConfig
from cfs.train.rundir import MODEL, SUMMARY

FREE = {"stages", "resume", "out", "config"}
"""Flags that a sequence has for itself; any other holds for each of its stages."""


def fine_tune_in_stages(config: TrainConfig, ranks: Ranks) -> None:
    """Every stage in a run directory of its own, then the matrix of what each left. Collective.

    Flags of the command line hold for all stages; those of a stage's file win over them.
    Interrupted, `--resume` goes on with the stage that was at work.
    """
    assert config.stages is not None
    if config.out is None:
        raise UserError("--stages: needs --out, the directory of the stages")
    out = Path(config.out)
    if out.is_dir() and any(out.iterdir()) and not config.resume:
        raise UserError(f"--out {out}: is not empty; --resume goes on there, or choose another")
    stages = _stage_configs(config, out)
    for number, stage in enumerate(stages, start=1):
        if ranks.is_main:
            print(f"stage {number} of {len(stages)}: {config.stages[number - 1]}")
        if not fine_tune(stage, ranks, flags=set()):
            return
    if ranks.is_main:
        _report(stages, out)


def _stage_configs(config: TrainConfig, out: Path) -> list[TrainConfig]:
    """The stages' configs, checked before the first of them begins."""
    common = {name: getattr(config, name) for name in given_flags(TrainConfig) - FREE}
    files = config.stages or []
    stages: list[TrainConfig] = []
    for number, file in enumerate(files, start=1):
        if not Path(file).is_file():
            raise UserError(f"--stages {file}: no such file")
        arguments = ["--config", file]
        own = parse(TrainConfig, "", arguments)
        named = given_flags(TrainConfig, arguments)
        for flag in sorted(named & {"stages", "out", "resume"}):
            raise UserError(f"--stages {file}: a stage has no {flag}; leave it out of the file")
        if number > 1 and "model" in named:
            raise UserError(
                f"--stages {file}: stage {number} starts from the result of the one before; leave "
                "model out of the file"
            )
        values: dict[str, Any] = common | {name: getattr(own, name) for name in named}
        if stages:
            values = _defaults_after(stages[0], values) | values
            values["model"] = str(Path(str(stages[-1].out)) / MODEL)
        values |= {"out": str(out / f"stage-{number}"), "resume": True}
        stages.append(TrainConfig(**values))
    return _with_common_needs(stages)


def _defaults_after(first: TrainConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What later stages take where nothing is said: a result of the embedded model trains like it,
    which its directory alone does not show."""
    if not first.on_embedded_model:
        return {}
    left_out = {"steps", "epochs"} if {"steps", "epochs"} & given.keys() else set()
    return {name: v for name, v in TINYWORLD_DEFAULTS.items() if name not in left_out}


def _with_common_needs(stages: list[TrainConfig]) -> list[TrainConfig]:
    """Every stage scores the skills of all, and `l2-init` keeps to what came before the first."""
    skills = list(dict.fromkeys(stage.skill for stage in stages if stage.on_tinyworld_data))
    changed = []
    for number, stage in enumerate(stages):
        values: dict[str, Any] = {"score_skills": skills or None}
        if number and "l2-init" in stage.method.split("+"):
            values["init_model"] = stages[0].model or str(TINYWORLD_DIR)
        changed.append(dataclasses.replace(stage, **values))
    return changed


def _report(stages: list[TrainConfig], out: Path) -> None:
    """Write and print the matrix; row 0 is before the first stage."""
    summaries = [json.loads((Path(str(s.out)) / SUMMARY).read_text("utf-8")) for s in stages]
    names = [stage.skill for stage in stages]
    if len(set(names)) < len(names) or not all(summary["skills"] for summary in summaries):
        print(f"{out}: no matrix, as only stages with a TinyWorld skill each are scored")
        return
    first = {name: score["base"] for name, score in summaries[0]["skills"].items()}
    rows = [first]
    rows += [{n: score["tuned"] for n, score in s["skills"].items()} for s in summaries]
    scores = np.array([[row[name] for name in names] for row in rows])
    old = [name for name in first if name not in names]
    old_means = np.array([np.mean([row[name] for name in old]) for row in rows])
    kls = [summary["kl_nats"] for summary in summaries]
    write_stages(out, names, scores, old_means, kls)
