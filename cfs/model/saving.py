"""Write Hugging Face directories: safetensors in shards, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cfs.files import fsync, replacing_directory
from cfs.model.config import ModelConfig
from cfs.model.decoder import Decoder
from cfs.model.weights import COMPANION_FILES, INDEX_FILE, SINGLE_FILE, stored_name

MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    model: Decoder,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory that `transformers` loads to the same logits, whole or not at all.

    dtype  of the stored tensors; by default the parameters' own. The tokenizer files come from
           the directory that the model was loaded from. An older directory at `path` is replaced.
    """
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    save_tensors(model.config, tensors, path, model.source_dir, dtype, max_shard_bytes)


def save_tensors(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    source_dir: str | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save_model` for parameters that arrive one by one, such as those gathered from shards.

    tensors  pairs of our parameter name and its full value, each consumed before the next is
             asked for, so that one shard is in memory at a time
    """
    with replacing_directory(path) as directory:
        shard: dict[str, Tensor] = {}
        shards: list[list[str]] = []
        total_bytes, stored_dtype = 0, dtype
        for name, value in tensors:
            stored_dtype = dtype or value.dtype
            stored = value.to(device="cpu", dtype=stored_dtype).contiguous()
            if shard and sum(t.nbytes for t in shard.values()) + stored.nbytes > max_shard_bytes:
                _write_shard(directory, shard, shards)
            shard[stored_name(name)] = stored
            total_bytes += stored.nbytes
        _write_shard(directory, shard, shards)
        _name_shards(directory, shards, total_bytes)
        _write_companions(directory, config, stored_dtype, source_dir)


def _write_shard(directory: Path, shard: dict[str, Tensor], shards: list[list[str]]) -> None:
    """Write and empty `shard`, and note its names."""
    shards.append(list(shard))
    save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
    shard.clear()


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, known once their number is, and write the index."""
    if len(shards) == 1:
        (directory / "shard-1").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_companions(
    directory: Path, config: ModelConfig, dtype: torch.dtype | None, source_dir: str | None
) -> None:
    raw = dict(config.raw)
    name = str(dtype).removeprefix("torch.")
    for key in ("torch_dtype", "dtype"):  # the older and the newer spelling
        if key in raw:
            raw[key] = name
    raw.setdefault("dtype" if "torch_dtype" not in raw else "torch_dtype", name)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    for file in COMPANION_FILES:
        if source_dir is not None and (Path(source_dir) / file).is_file():
            shutil.copyfile(Path(source_dir) / file, directory / file)
    for file in directory.iterdir():
        fsync(file)
