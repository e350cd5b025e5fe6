"""LoRA's steps on a model that is sharded, and what they make of it, whole.

torchrun --nproc-per-node 2 -m tests.baselines.lora_ranks BASE FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cfs import ranks as process_ranks
from cfs.baselines.lora import Lora, init_adapters, merged_parameters
from cfs.cli import run
from cfs.model import Decoder, build_model
from cfs.model.weights import open_weights
from cfs.ranks import Ranks
from cfs.train.parallel import (
    Checkpointing,
    LocalShard,
    checkpoint_activations,
    full_parameters,
    local_part,
    local_shards,
    shard,
)

STEPS, LR, SEED = 3, 0.5, 3
LORA = Lora(lora_rank=5, lora_alpha=10.0)
"""Five rows of A do not halve."""


def wrapped(
    base: Path, ranks: Ranks, kind: Checkpointing, lora: Lora = LORA, seed: int = SEED
) -> Decoder:
    """As a run sets it up: on `meta`, then wrapped, sharded, filled with this rank's rows."""
    stored = open_weights(base)
    model = build_model(stored.config, device="meta")
    checkpoint_activations(model, kind)
    lora.wrap(model)
    shard(model, ranks, torch.float32)
    model.to_empty(device=ranks.device)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            piece = LocalShard(name, parameter)
            piece.local.copy_(stored.read(name, piece.rows))
    init_adapters(local_shards(model), seed)
    return model


def take_steps(model: Decoder, ranks: Ranks, num_steps: int = STEPS) -> dict[str, Tensor]:
    """Gradient descent on the ranks' halves of the same batches; the result merged and whole."""
    rows_each = 4 // ranks.world_size
    for step in range(num_steps):
        ids = torch.randint(1, 97, (4, 12), generator=torch.Generator().manual_seed(step))
        own = ids[ranks.rank * rows_each : (ranks.rank + 1) * rows_each]
        is_target = torch.ones_like(own, dtype=torch.bool)
        is_target[:, 0] = False
        (-model(own, is_target).mean()).backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                local_part(parameter.detach()).sub_(local_part(parameter.grad), alpha=LR)
        model.zero_grad()
    merged = merged_parameters(full_parameters(model), LORA.scale)
    return {name: value.clone() for name, value in merged}


def main() -> None:
    ranks = process_ranks.start("cpu")
    result = take_steps(wrapped(Path(sys.argv[1]), ranks, "block"), ranks)
    if ranks.is_main:
        save_file(result, sys.argv[2])
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
