"""Gradients of one batch, on one rank or, as a script under torchrun, on several.

torchrun --nproc-per-node 2 -m tests.train.gradients FILE MAX_TOKENS
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import micro_batches
from cfs.model import Decoder
from cfs.ranks import Ranks
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.parallel import full_parameters, shard
from tests.conftest import ALONE, tiny_model


def batch_of_eight() -> list[Draw]:
    """Unequal lengths and masks, both sources, one row without any target."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(5, 1), (9, 4), (12, 12), (3, 2), (20, 1), (7, 6), (16, 1), (11, 8)]
    return [
        Draw(
            make_example(
                [0, *torch.randint(1, 97, (length - 1,), generator=generator).tolist()],
                first_target,
            ),
            synthetic=first_target == 1,
        )
        for length, first_target in shapes
    ]


def gradients(
    model: Decoder,
    draws: list[Draw],
    max_tokens: int,
    lam: float,
    normalize: str,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Accumulated as the loop accumulates them, whole, by name; they overwrite the parameters."""
    weights = SourceWeights.of(TargetCounts.of(draws), lam, normalize)  # type: ignore[arg-type]
    model.zero_grad()
    for batch in micro_batches(draws, max_tokens, ranks.rank, ranks.world_size):
        loss, _, _ = micro_batch_loss(model, batch, weights)
        (loss * ranks.world_size).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    return {name: value.clone() for name, value in full_parameters(model)}


def main() -> None:
    group = process_ranks.start("cpu")
    sharded = tiny_model("llama")
    shard(sharded, group, torch.float32)
    result = gradients(sharded, batch_of_eight(), int(sys.argv[2]), 0.7, "pooled", group)
    if group.is_main:
        torch.save(result, sys.argv[1])
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
