"""Where a run writes, how an interrupted one is found again, and what it notes of its times."""

from __future__ import annotations

import dataclasses
import fcntl
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

import cfs
from cfs.cli import save_yaml
from cfs.errors import UserError
from cfs.files import blaming
from cfs.train.config import TrainConfig

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
CHECKPOINTS, MODEL, LOCK = "checkpoints", "model", ".lock"
# What a run may change when it goes on: where and how it computes, what it keeps and shows.
CHANGEABLE = frozenset(
    "out resume corpora device micro_batch_tokens activation_checkpointing attention "
    "compile shard_ranks offload_reference save_every keep stop_after kl_every skill_items "
    "tensorboard wandb plan plan_ranks plan_gib".split()
)


def recalled(config: TrainConfig, flags: set[str]) -> TrainConfig:
    """The config of the run that `--resume` goes on with, under the flags given now.

    With `--resume --out DIR` alone that is the run's own config; a flag that would make it
    another run is refused. Without an earlier run the config stays as it is.

    flags  the fields that were given, be it with their default
    """
    if not config.resume or config.out is None:
        return config
    file = Path(config.out) / CONFIG
    if not file.is_file():
        return config
    began = _read_config(file)
    given: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in flags
    }
    # The run's epochs became steps when its examples were counted; `check_same_run` compares.
    values: dict[str, Any] = dataclasses.asdict(began) | {"stop_after": None} | given
    if "epochs" in given:
        values["steps"] = None
    return TrainConfig(**values)


def check_holds_run(config: TrainConfig) -> None:
    """Refuse to go on with a run that is not there, where nothing says what it was to be."""
    if not (Path(str(config.out)) / CONFIG).is_file():
        raise UserError(
            f"--out {config.out}: holds no run that --resume could go on with; to begin one there, "
            "give its flags too"
        )


def check_same_run(config: TrainConfig, out: Path) -> None:
    """Refuse to go on with the run in `out` as another one than it began; `config` is counted."""
    began = _read_config(out / CONFIG)
    for field in dataclasses.fields(config):
        now, then = getattr(config, field.name), getattr(began, field.name)
        if field.name not in CHANGEABLE and now != then:
            raise UserError(
                f"--{field.name.replace('_', '-')} {now}: the run in {out} began with {then}; "
                "leave the flag out to go on with it, or choose another --out"
            )


@contextmanager
def claimed_run_directory(config: TrainConfig, facts: list[str]) -> Iterator[Path]:
    """`--out`, or the next free `runs/NAME-METHOD-N`, held against other processes.

    A directory with files is refused, unless `--resume` finds a run of this config in it.
    """
    out = _named(config) if config.out is not None else _next_free(config)
    with blaming(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another process trains there now") from error
        is_new = not (out / CONFIG).is_file()
        if not is_new:
            check_same_run(config, out)
        else:
            with blaming(out, "choose another --out"):
                # Not how far it goes this time: the file repeats the whole run.
                whole = dataclasses.replace(config, resume=False, stop_after=None)
                save_yaml(whole, out / CONFIG, facts)
        try:
            yield out
        except UserError:
            if is_new and not (out / CHECKPOINTS).is_dir():
                # Nothing has begun: mended, the same command may use the directory.
                (out / CONFIG).unlink()
                (out / LOCK).unlink()
            raise


def _named(config: TrainConfig) -> Path:
    out = Path(str(config.out))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; expected a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return out
    holds_run = (out / CONFIG).is_file()
    if holds_run and not config.resume:
        saved = sorted(f.name for f in (out / CHECKPOINTS).glob("step-*"))
        newest = f" with checkpoint {saved[-1]}" if saved else ""
        raise UserError(
            f"--out {out}: is not empty, it holds a run{newest}; --resume goes on with it, or "
            "choose another"
        )
    if not holds_run and {f.name for f in out.iterdir()} != {LOCK}:
        raise UserError(
            f"--out {out}: is not empty and holds no run; choose another, so that nothing is lost"
        )
    return out


def _next_free(config: TrainConfig) -> Path:
    stem = "tinyworld" if config.on_embedded_model else Path(str(config.model)).name
    number = 1
    while (out := Path("runs") / f"{stem}-{config.method}-{number}").exists():
        number += 1
    return out


def _read_config(file: Path) -> TrainConfig:
    try:
        values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return TrainConfig(**values)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: cannot be read as the config of a run ({reason}); choose another --out"
        ) from error


def run_facts(world_size: int) -> list[str]:
    """Version, commit, libraries and command line, for the head of config.yaml."""
    commit = subprocess.run(
        ["git", "-C", str(Path(cfs.__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return [
        f"cfs {cfs.__version__}, commit {commit or 'unknown'}, torch {torch.__version__}, "
        f"{world_size} rank{'s' if world_size > 1 else ''}",
        shlex.join(sys.argv),
    ]
