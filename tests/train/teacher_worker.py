"""A student distilled from a teacher, both sharded: losses and gradients of one batch.

torchrun --nproc-per-node 2 -m tests.train.teacher_worker DIR FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.data.packing import micro_batches
from cfs.model import load_model
from cfs.ranks import Ranks
from cfs.train.parallel import full_parameters, shard
from cfs.train.teacher import distilled, frozen_original
from tests.conftest import tiny_model
from tests.train.gradients import batch_of_seven

TEMPERATURE = 2.0
KL_WEIGHT = 3.0

Case = tuple[str, torch.dtype, int]
"""Name of the teacher's directory, compute dtype, ranks that hold one copy."""
Outcome = tuple[list[float], dict[str, Tensor]]
"""Sums of log p and of the KL in nats, and the student's gradients, whole."""


def outcome(directory: Path, dtype: torch.dtype, ranks: Ranks, per_copy: int) -> Outcome:
    """Of the sum over all targets of KL_WEIGHT * KL - log p, each document alone."""
    tied = directory.name == "tied"
    teacher = frozen_original(directory, ranks, dtype, per_copy)
    original = dict(load_model(directory).named_parameters())
    model = tiny_model("llama", seed=2, tie_word_embeddings=tied)
    shard(model, ranks, dtype, per_copy)
    sums = torch.zeros(2, dtype=torch.float64)
    batches = micro_batches(batch_of_seven(), 1, ranks.rank, ranks.world_size)
    for batch in batches:
        logprobs, kl = distilled(model, teacher, batch, TEMPERATURE)
        if isinstance(teacher, FSDPModule):
            assert all(isinstance(p, DTensor) for p in teacher.parameters()), "nothing is gathered"
        with torch.no_grad():  # what the student's backward pass needs must survive it
            teacher(batches[0].input_ids)
        ((KL_WEIGHT * kl - logprobs).sum() * ranks.world_size).backward()
        sums += torch.stack((logprobs.detach().sum(), kl.detach().sum()))
    assert all(p.grad is None for p in teacher.parameters()), "the teacher is frozen"
    for name, value in full_parameters(teacher):
        assert value.dtype == original[name].dtype, name
        assert torch.equal(value, original[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    grads = {name: value.clone() for name, value in full_parameters(model)}
    return ranks.sum(sums).tolist(), grads


def outcomes(parent: Path, ranks: Ranks) -> Iterator[tuple[Case, Outcome]]:
    copies = sorted({1, ranks.world_size})
    names, dtypes = ("tied", "untied", "half"), (torch.float32, torch.bfloat16)
    for name, dtype, per_copy in product(names, dtypes, copies):
        yield (name, dtype, per_copy), outcome(parent / name, dtype, ranks, per_copy)


def main() -> None:
    group = process_ranks.start("cpu")
    found = dict(outcomes(Path(sys.argv[1]), group))
    if group.is_main:
        torch.save(found, sys.argv[2])
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
