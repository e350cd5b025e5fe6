"""theta* and other models beside the trained one: this rank's rows alone, in their own dtype.

A method that compares weights with those of another model needs no second model: each rank holds
the same rows of it that it trains, and nothing is gathered. Over all ranks that takes one copy of
the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cfs.errors import UserError
from cfs.model import read_config
from cfs.model.weights import StoredWeights, open_weights, resolve_checkpoint
from cfs.train.parallel import LocalShard


def stored_rows(
    shards: list[LocalShard], stored: StoredWeights, on_host: bool = False
) -> list[Tensor]:
    """The rows of a checkpoint that belong to each shard, in the order of the shards.

    on_host  keep them in host memory (pinned beside CUDA), to be brought over piece by piece
    """
    found = []
    for shard in shards:
        masters = shard.local.dtype
        # A master narrower than the checkpoint starts at the rounded value, so that is theta*.
        value = stored.read(shard.name, shard.rows).to(masters)
        if stored.dtype.itemsize < masters.itemsize:
            value = value.to(stored.dtype)
        if not on_host:
            value = value.to(shard.local.device)
        elif shard.local.device.type == "cuda":
            value = value.pin_memory()
        found.append(value)
    return found


def rows_of(
    directory: str, flag: str, shards: list[LocalShard], start: StoredWeights, on_host: bool = False
) -> list[Tensor]:
    """`stored_rows` of another model, which must have the shape of the one the run starts from.

    Raises `UserError` that names the flag by which it was given.
    """
    path = resolve_checkpoint(directory)
    check_shape(path, flag, start.directory)
    return stored_rows(shards, open_weights(path), on_host)


def check_shape(directory: Path, flag: str, start: Path) -> None:
    """Raise `UserError` unless the models in both directories are of one config."""
    if read_config(directory) != read_config(start):
        raise UserError(
            f"{flag} {directory}: is no model of the shape of {start}; give one that was "
            "fine-tuned from it"
        )
