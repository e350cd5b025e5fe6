"""AdamW on ranks: torchrun ... -m tests.train.optim_steps SOURCE OUT RANKS_PER_COPY STEP ...

For each case, steps with gradients that depend on the step alone, from the first STEP to the last;
at each in between and at the last it leaves the checkpoint OUT/CASE-STEP and the weights. Where the
first is not 0, it goes on from SOURCE/CASE-STEP.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.ranks import Ranks
from cfs.train.optim import ShardedAdamW
from cfs.train.parallel import LocalShard, full_parameters, shard
from tests.conftest import tiny_model

CASES: dict[str, tuple[Any, torch.dtype]] = {
    "float": ("adamw", torch.float32),
    "eightbit": ("adamw8bit", torch.float32),
    "rounded": ("adamw8bit", torch.bfloat16),
}


def gradients(shards: list[LocalShard], step: int) -> list[Tensor]:
    """Whole gradients, alike on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(s.whole_shape, generator=generator).mul(1e-2) for s in shards]


def take_steps(
    case: str, source: Path, out: Path, ranks: Ranks, per_copy: int, stops: list[int]
) -> None:
    kind, dtype = CASES[case]
    model = tiny_model("llama", hidden_size=64, tie_word_embeddings=True).to(dtype)
    shards = shard(model, ranks, dtype, per_copy)
    optimizer = ShardedAdamW(shards, kind, weight_decay=0.1, beta2=0.999, seed=7)
    parameters = {f"model.{s.name}": s.like(s.local) for s in shards}
    if stops[0]:
        path = source / f"{case}-{stops[0]}"
        dcp.load(parameters, checkpoint_id=path)
        facts = json.loads(path.with_suffix(".json").read_text())
        optimizer.load_state(facts, lambda tensors: dcp.load(tensors, checkpoint_id=path))
    for first, last in pairwise(stops):
        for step in range(first, last):
            for own, grad in zip(shards, gradients(shards, step), strict=True):
                own.parameter.grad = own.like(grad[own.rows].to(dtype))  # type: ignore[assignment]
            optimizer.step(1e-3, step, scale=0.5)
        path = out / f"{case}-{last}"
        dcp.save(parameters | optimizer.state_tensors(), checkpoint_id=path)
        weights = dict(full_parameters(model))
        if ranks.is_main:
            path.with_suffix(".json").write_text(json.dumps(optimizer.state_facts()))
            save_file(weights, path.with_suffix(".safetensors"))


def main() -> None:
    ranks = process_ranks.start("cpu")
    source, out = map(Path, sys.argv[1:3])
    per_copy, *stops = map(int, sys.argv[3:])
    for case in CASES:
        take_steps(case, source, out, ranks, per_copy, stops)
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
