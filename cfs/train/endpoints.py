"""Where a run starts and ends: masters from a checkpoint or a seed, and the result on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cfs.model import Decoder, build_model
from cfs.model.attention import choose_training_route
from cfs.model.saving import save_tensors
from cfs.model.weights import StoredWeights, open_weights
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.optim import init_weights
from cfs.train.parallel import (
    LocalShard,
    checkpoint_activations,
    compile_blocks,
    full_parameters,
    local_shards,
    shard,
)


@dataclass(frozen=True)
class Trained:
    """A model set up for training on this rank."""

    model: Decoder
    shards: list[LocalShard]
    stored: StoredWeights
    """The checkpoint it started from; of random weights, the one whose shape it has."""
    result_dtype: torch.dtype
    """Of the model that the run writes."""


def starting_model(config: TrainConfig, directory: Path, ranks: Ranks) -> Trained:
    """Masters on this rank's device, of which it reads and holds its own rows alone.

    Random weights are the exception: every rank draws the whole model before it is sharded.
    """
    stored = open_weights(directory)
    masters, compute = getattr(torch, config.masters), getattr(torch, config.dtype)
    from_scratch = config.method_spec.from_scratch
    model = build_model(stored.config, device="cpu" if from_scratch else "meta")
    model.source_dir = str(directory)
    if from_scratch:
        init_weights(model, config.seed)
    model.to(masters)
    if config.attention != "auto":
        model.packed_route = choose_training_route(config.attention, ranks.device, compute)
    checkpoint_activations(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)
    if from_scratch:
        model.to(ranks.device)
    shard(model, ranks, compute, config.shard_ranks)
    if not from_scratch:
        model.to_empty(device=ranks.device)
        for piece in local_shards(model):
            piece.local.copy_(stored.read(piece.name, piece.rows))
    result_dtype = torch.float32 if from_scratch else stored.dtype
    return Trained(model, local_shards(model), stored, result_dtype)


def save_result(model: Decoder, path: Path, dtype: torch.dtype, ranks: Ranks) -> None:
    """Write the whole model from rank 0, gathered parameter by parameter. Collective."""
    parameters = full_parameters(model)
    if ranks.is_main:
        save_tensors(model.config, parameters, path, model.source_dir, dtype)
    else:
        for _ in parameters:
            pass
    ranks.wait()
