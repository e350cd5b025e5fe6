"""Small checkpoints of one rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cfs.train.checkpoint import Checkpoints, load, verify
from tests.conftest import ALONE

SHARD = "rank-00000.safetensors"


def tensors_of(step: int) -> dict[str, Tensor]:
    return {"a": torch.full((300, 7), float(step)), "b": torch.tensor(step)}


def saved(directory: Path, *steps: int, keep: int = 9) -> list[Path]:
    checkpoints = Checkpoints(directory, ALONE, keep)
    for step in steps:
        checkpoints.save(step, tensors_of(step), {"step": step}, wait=True)
    return [directory / f"step-{step:06d}" for step in steps]


def loads(path: Path, step: int) -> bool:
    verify(path, ALONE)
    tensors = tensors_of(-1)
    load(path, tensors, ALONE)
    return all(torch.equal(tensors[name], value) for name, value in tensors_of(step).items())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
