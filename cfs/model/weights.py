"""Read Hugging Face directories: safetensors only, strict, one tensor at a time.

No pickle is ever read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfs.errors import UserError
from cfs.model.config import ModelConfig, read_config
from cfs.model.decoder import Decoder
from cfs.model.llama import Llama
from cfs.model.olmo import Olmo

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
# Recomputable buffers that some published Llama checkpoints still carry.
LEGACY_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def resolve_checkpoint(path: str | Path, weights: bool = True) -> Path:
    """A local directory as it is; a hub name `owner/model` downloaded, safetensors only.

    weights  False: of a hub model the config and tokenizer alone

    Raises `UserError` where there is neither.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UserError(f"{path}: is a file; expected a model directory with config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise UserError(f"{path}: no such directory; expected a model directory or a hub name")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *COMPANION_FILES, *(["*.safetensors", INDEX_FILE] if weights else [])]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen kinds: offline, unknown, gated
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: no such directory, and not to be had from the hub ({reason}); "
            "give a local directory or a reachable hub name"
        ) from error


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> Decoder:
    """A model of the config's family with arbitrary weights; on `meta` it allocates nothing."""
    with torch.device(device):
        return {"llama": Llama, "olmo": Olmo}[config.family](config)


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Read a Hugging Face directory; `model(input_ids)` then gives logits (B, T, V).

    dtype   of the parameters; by default the checkpoint's own
    device  of the parameters; memory peaks at the parameters and one tensor more

    Raises `UserError` for an unsupported config and for every tensor that is missing, unknown,
    misshapen, not floating point, or cannot be read.
    """
    stored = open_weights(resolve_checkpoint(path))
    model = build_model(stored.config, device="meta")
    model.source_dir = str(stored.directory)
    model.to(dtype or stored.dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(stored.read(name))
    return model


@dataclass(frozen=True)
class StoredWeights:
    """A checkpoint whose files' headers agree with its config: every tensor is there and fits."""

    directory: Path
    config: ModelConfig
    location: dict[str, Path]
    dtype: torch.dtype
    """The widest among the tensors."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """What is stored of our parameter `name`, or of some of its rows: on the CPU, as stored."""
        stored = stored_name(name)
        # Opened anew for each tensor: one open map of the file would keep every page read so far.
        with _opened(self.location[stored]) as tensors:
            if rows is None:
                return tensors.get_tensor(stored)
            return tensors.get_slice(stored)[rows.start : rows.stop]


def open_weights(directory: Path) -> StoredWeights:
    """The weights of a Hugging Face directory, checked and not yet read.

    Raises `UserError` as `load_model` does.
    """
    config = read_config(directory)
    model = build_model(config, device="meta")
    expected = {stored_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    location, dtype = _checked_headers(directory, expected, config.tie_word_embeddings)
    stored = StoredWeights(directory, config, location, dtype)
    if config.tie_word_embeddings and "lm_head.weight" in location:
        _check_tied(stored)
    return stored


def checkpoint_dtype(path: str | Path) -> torch.dtype:
    """The dtype that `load_model` gives when none is asked for: the widest among the tensors."""
    headers = (row for file in _weight_files(Path(path)) for row in _header(file))
    return reduce(torch.promote_types, {dtype for _, _, dtype in headers})


def stored_name(name: str) -> str:
    """Name in the file of the parameter that our modules call `name`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _checked_headers(
    directory: Path, expected: dict[str, tuple[int, ...]], tied: bool
) -> tuple[dict[str, Path], torch.dtype]:
    """Hold the files' headers against the expected shapes, before anything is allocated.

    Returns the file of each tensor and the widest dtype among them.
    """
    location: dict[str, Path] = {}
    dtypes: set[torch.dtype] = set()
    for file, listed in _weight_files(directory).items():
        names = []
        for name, shape, dtype in _header(file):
            names.append(name)
            is_tied_copy = tied and name == "lm_head.weight"
            if name not in expected and not is_tied_copy:
                raise UserError(f"{file}: tensor {name} is not part of the model in config.json")
            wanted = expected["model.embed_tokens.weight" if is_tied_copy else name]
            if shape != wanted:
                raise UserError(
                    f"{file}: tensor {name} has shape {shape}; config.json asks for {wanted}"
                )
            if name in location:
                raise UserError(f"{file}: tensor {name} is also in {location[name].name}")
            location[name] = file
            dtypes.add(dtype)
        absent = sorted(set(listed) - set(names)) if listed is not None else []
        if absent:
            raise UserError(f"{file}: tensor {absent[0]} is missing; the index says it is here")
    missing = sorted(set(expected) - set(location))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory}: tensor {missing[0]}{more} missing from the safetensors")
    return location, reduce(torch.promote_types, dtypes)


def _weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """Each safetensors file of the checkpoint, with the names its index lists for it."""
    if (directory / INDEX_FILE).is_file():
        return _indexed_files(directory)
    if (directory / SINGLE_FILE).is_file():
        return {directory / SINGLE_FILE: None}
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    if pickles:
        raise UserError(
            f"{directory}: holds {pickles[0].name} but no {SINGLE_FILE}; pickled weights can run "
            "code and are never read; convert them to safetensors"
        )
    raise UserError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _indexed_files(directory: Path) -> dict[Path, list[str] | None]:
    index = directory / INDEX_FILE
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not a safetensors index ({type(error).__name__}: {error})"
        ) from error
    files: dict[Path, list[str] | None] = {}
    for name, file in pairs:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: places {name} in {file!r}; only .safetensors files of the same "
                "directory are read"
            )
        if not (directory / file).is_file():
            raise UserError(f"{index}: names {file}, which is not there; copy that shard too")
        listed = files.setdefault(directory / file, [])
        assert listed is not None
        listed.append(name)
    return files


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor in `file` that counts, without reading one."""
    with _opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            if LEGACY_BUFFER.fullmatch(name):
                continue
            piece = tensors.get_slice(name)
            dtype = FLOAT_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{file}: tensor {name} has dtype {piece.get_dtype()}; expected one of "
                    f"{', '.join(FLOAT_DTYPES)}"
                )
            yield name, tuple(piece.get_shape()), dtype


FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: damaged or not a safetensors file ({error}); copy it again"
        ) from error


def _check_tied(stored: StoredWeights) -> None:
    """Hold a stored copy of the tied head against the embedding."""
    name = "lm_head.weight"
    embedding, head = stored.read("embed_tokens.weight"), stored.read(name)
    dtype = torch.promote_types(embedding.dtype, head.dtype)
    if not torch.equal(head.to(dtype), embedding.to(dtype)):
        raise UserError(
            f"{stored.location[name]}: {name} differs from the embedding though config.json ties "
            "them; set tie_word_embeddings to false"
        )
