"""Where a run starts and ends: masters from a checkpoint or a seed, and the result on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from cfs.model import Decoder, build_model, load_model, read_config
from cfs.model.saving import save_tensors
from cfs.model.weights import checkpoint_dtype
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.optim import init_weights
from cfs.train.parallel import full_parameters


def starting_model(
    config: TrainConfig, directory: Path, ranks: Ranks
) -> tuple[Decoder, torch.dtype]:
    """Float32 masters on this rank's device, and the dtype the result is stored in."""
    if not config.method_spec.from_scratch:
        stored = checkpoint_dtype(directory)
        return load_model(directory, dtype=torch.float32, device=ranks.device), stored
    model = build_model(read_config(directory), device="cpu")
    init_weights(model, config.seed)
    model.source_dir = str(directory)
    return model.to(ranks.device), torch.float32


def save_result(model: Decoder, path: Path, dtype: torch.dtype, ranks: Ranks) -> None:
    """Write the whole model from rank 0, gathered parameter by parameter. Collective."""
    parameters = full_parameters(model)
    if ranks.is_main:
        save_tensors(model.config, parameters, path, model.source_dir, dtype)
    else:
        for _ in parameters:
            pass
    ranks.wait()
