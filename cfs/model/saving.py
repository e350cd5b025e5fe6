"""Write Hugging Face directories: safetensors in shards, whole or not at all.

What each file holds follows from the config alone. So its header is written first and its tensors
as they arrive: one of them is in memory at a time, however large the files.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.files import fsync, replacing_directory
from cfs.model.config import ModelConfig
from cfs.model.decoder import Decoder
from cfs.model.weights import (
    COMPANION_FILES,
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    build_model,
    stored_name,
)

MAX_SHARD_BYTES = 5 * 10**9

DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}

Shapes = dict[str, torch.Size]
"""Our names and the shapes of the parameters that one file holds, in the file's order."""


def save_model(
    model: Decoder,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory that `transformers` loads to the same logits, whole or not at all.

    dtype  of the stored tensors; by default the widest of the parameters', which loses nothing

    The tokenizer files come from the directory that the model was loaded from. An older directory
    at `path` is replaced, and left as it was where an `OSError` stops the writing.
    """
    stored_dtype = dtype or reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    tensors = ((name, p.detach()) for name, p in model.named_parameters())
    save_tensors(model.config, tensors, path, model.source_dir, stored_dtype, max_shard_bytes)


def save_tensors(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    path: str | Path,
    source_dir: str | None,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save_model` for parameters that arrive one by one, such as those gathered from shards.

    tensors          pairs of our parameter name and its full value: all of the config's model,
                     in its order; each is written before the next is asked for
    dtype            that all are stored in
    max_shard_bytes  of a file's tensors; a larger tensor has a file of its own
    """
    if dtype not in DTYPE_NAMES:
        known = ", ".join(map(str, DTYPE_NAMES))
        raise UserError(f"dtype {dtype}: cannot be stored; expected one of {known}")
    shards = _planned_shards(config, dtype, max_shard_bytes)
    files = _file_names(len(shards))
    arriving = iter(tensors)
    with replacing_directory(path) as directory:
        for file, shapes in zip(files, shards, strict=True):
            _write_shard(directory / file, shapes, dtype, arriving)
        extra, _ = next(arriving, (None, None))  # lets a generator end, too
        assert extra is None, f"{extra} arrived after the model's last parameter"
        if len(files) > 1:
            _write_index(directory, files, shards, dtype)
        _write_companions(directory, config, dtype, source_dir)
        for file in directory.iterdir():
            fsync(file)


def _planned_shards(config: ModelConfig, dtype: torch.dtype, max_bytes: int) -> list[Shapes]:
    """Deal the model's parameters out to files, in their order; every file gets at least one."""
    shards: list[Shapes] = [{}]
    left = max_bytes
    for name, parameter in build_model(config, device="meta").named_parameters():
        num_bytes = parameter.numel() * dtype.itemsize
        if shards[-1] and num_bytes > left:
            shards.append({})
            left = max_bytes
        shards[-1][name] = parameter.shape
        left -= num_bytes
    return shards


def _file_names(number: int) -> list[str]:
    """Of a checkpoint's files, as `transformers` names them."""
    if number == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)]


def _write_shard(
    file: Path, shapes: Shapes, dtype: torch.dtype, arriving: Iterator[tuple[str, Tensor]]
) -> None:
    """Write one safetensors file, of the tensors that arrive next."""
    with file.open("wb") as stream:
        stream.write(_header(shapes, dtype))
        for name, shape in shapes.items():
            # No variable holds a tensor: each is freed before the next is asked for.
            stream.write(_stored_bytes(_next_value(arriving, name, shape), dtype))


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    """What precedes the tensors' bytes in a safetensors file.

    The length of a JSON object as a little-endian uint64, and the object, padded with spaces so
    that the tensors begin at a multiple of 8. (The format's description in the README of
    github.com/huggingface/safetensors.)
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[stored_name(name)] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _next_value(arriving: Iterator[tuple[str, Tensor]], name: str, shape: torch.Size) -> Tensor:
    """The value that arrives next, which must be that of parameter `name`."""
    given, value = next(arriving, ("nothing", torch.empty(0)))
    assert (given, value.shape) == (name, shape), (
        f"the config has {name} {list(shape)} next, but {given} {list(value.shape)} arrived"
    )
    return value


def _stored_bytes(value: Tensor, dtype: torch.dtype) -> memoryview:
    """A tensor's content in row-major order; as uint8, since numpy knows no bfloat16."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    stored = value.to(device="cpu", dtype=dtype).contiguous()
    return stored.view(-1).view(torch.uint8).numpy().data


def _write_index(
    directory: Path, files: list[str], shards: list[Shapes], dtype: torch.dtype
) -> None:
    """Say which file holds which tensor, and how many bytes all of them have."""
    weight_map = {
        stored_name(name): file
        for file, shapes in zip(files, shards, strict=True)
        for name in shapes
    }
    num_elements = sum(shape.numel() for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": num_elements * dtype.itemsize}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_companions(
    directory: Path, config: ModelConfig, dtype: torch.dtype, source_dir: str | None
) -> None:
    """Write config.json with the stored dtype, and copy what belongs to the tokenizer."""
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
