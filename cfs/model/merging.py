"""Make a checkpoint out of several of the same model, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.files import blaming
from cfs.model.config import ModelConfig
from cfs.model.saving import save_tensors
from cfs.model.weights import StoredWeights, build_model, open_weights
from cfs.progress import Bar

Merge = Callable[[str, Tensor, list[Tensor]], Tensor]
"""(name, original, tuned) -> merged: one parameter, whole, by our name for it."""

CONFIG_KEYS = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
"""Keys of config.json that `ModelConfig` has by other names."""


def merge_checkpoints(
    base: Path, tuned: list[Path], out: Path, function: Merge, title: str | None = None
) -> None:
    """Write to `out` the model whose every parameter is `function` of the same one of all models.

    base      directory of theta*; the result has its config, its dtype and its tokenizer files
    tuned     directories of the models that were fine-tuned from it
    function  gets float32 tensors on the CPU, float64 where a checkpoint is; returns one of their
              shape
    title     of a progress bar; None shows none

    Memory is that of one parameter, the largest, of each model and of the result. A tied head is
    no parameter of its own and is merged as the embedding. Raises `UserError` before anything is
    written for a model that `load_model` would refuse or whose config differs from the base's,
    and where `out` cannot be written; what was there then stays.
    """
    original = open_weights(base)
    others = [open_weights(directory) for directory in tuned]
    for other in others:
        _check_alike(other, original)
    dtypes = [stored.dtype for stored in (original, *others)]
    wide = reduce(torch.promote_types, dtypes, torch.float32)
    names = [name for name, _ in build_model(original.config, device="meta").named_parameters()]

    def value(name: str) -> Tensor:
        star = original.read(name).to(wide)
        return function(name, star, [other.read(name).to(wide) for other in others])

    def values(bar: Bar) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, value(name)
            bar.advance()

    with (
        blaming(out, "free some space or choose another directory"),
        Bar(title or "", len(names), enabled=title is not None) as bar,
    ):
        save_tensors(original.config, values(bar), out, str(base), original.dtype)


def _check_alike(other: StoredWeights, original: StoredWeights) -> None:
    """Raise `UserError` unless both configs give one architecture and one arithmetic."""
    for name in (field.name for field in fields(ModelConfig) if field.compare):
        found, expected = getattr(other.config, name), getattr(original.config, name)
        if found != expected:
            key = CONFIG_KEYS.get(name, name)
            raise UserError(
                f"{other.directory}: config.json gives {key}={found!r}; expected {expected!r} as "
                f"in {original.directory}; give a model that was fine-tuned from that one"
            )
