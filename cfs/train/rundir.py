"""Where a run writes, and what it notes of its circumstances."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import torch

import cfs
from cfs.errors import UserError
from cfs.train.config import TrainConfig


def claim_run_directory(config: TrainConfig) -> Path:
    """Create `--out`, or the next free `runs/NAME-METHOD-N`. A directory with files is refused."""
    if config.out is not None:
        out = Path(config.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is not empty; choose another, so that nothing is lost")
        _make(out, exist_ok=True)
        return out
    stem = "tinyworld" if config.on_embedded_model else Path(str(config.model)).name
    number = 1
    while (out := Path("runs") / f"{stem}-{config.method}-{number}").exists():
        number += 1
    _make(out, exist_ok=False)
    return out


def _make(directory: Path, exist_ok: bool) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise UserError(f"--out {directory}: cannot be created ({error.strerror})") from error


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
