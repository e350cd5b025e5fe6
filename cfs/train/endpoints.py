"""Where a run starts and ends: masters from a checkpoint or a seed, and the result on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cfs.baselines import Method
from cfs.model import Decoder, build_model
from cfs.model.attention import choose_training_route
from cfs.model.saving import save_tensors
from cfs.model.weights import StoredWeights, open_weights, stored_name
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.optim import init_weights
from cfs.train.parallel import (
    LocalShard,
    all_shards,
    checkpoint_activations,
    compile_blocks,
    full_parameters,
    local_shards,
    shard,
    wrapped,
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


def starting_model(
    config: TrainConfig, directory: Path, ranks: Ranks, methods: Sequence[Method] = ()
) -> Trained:
    """Masters on this rank's device, of which it reads and holds its own rows alone.

    methods  may add parameters, or take some out of training

    Random weights are the exception: every rank draws the whole model before it is sharded.
    """
    stored = open_weights(directory)
    masters, compute = getattr(torch, config.masters), getattr(torch, config.dtype)
    from_scratch = config.from_scratch
    model = build_model(stored.config, device="cpu" if from_scratch else "meta")
    model.source_dir = str(directory)
    if from_scratch:
        init_weights(model, config.seed)
    wrapped(model, methods).to(masters)
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
        shards = all_shards(model)
        for piece in shards:
            if stored_name(piece.name) in stored.location:
                piece.local.copy_(stored.read(piece.name, piece.rows))
        for method in methods:
            method.fill(shards, config.seed)
    result_dtype = torch.float32 if from_scratch else stored.dtype
    if config.result_dtype is not None:
        result_dtype = getattr(torch, config.result_dtype)
    return Trained(model, local_shards(model), stored, result_dtype)


def save_result(
    model: Decoder, path: Path, dtype: torch.dtype, ranks: Ranks, methods: Sequence[Method] = ()
) -> None:
    """Write the whole model from rank 0, gathered parameter by parameter. Collective.

    methods  may have changed what the model's parameters are, and leave more beside `path`
    """

    def write_model(named: Iterator[tuple[str, Tensor]]) -> None:
        for method in methods:
            named = method.result(named)
        save_tensors(model.config, named, path, model.source_dir, dtype)

    _gathered_on_main(model, write_model, ranks)
    for method in methods:
        if method.leaves_more:
            more = partial(method.write_more, out=path.parent, base=str(model.source_dir))
            _gathered_on_main(model, more, ranks)


def _gathered_on_main(
    model: Decoder, write: Callable[[Iterator[tuple[str, Tensor]]], None], ranks: Ranks
) -> None:
    """Rank 0 writes, and the others help to gather. Collective."""
    parameters = full_parameters(model)
    if ranks.is_main:
        write(parameters)
    else:
        for _ in parameters:
            pass
    ranks.wait()
