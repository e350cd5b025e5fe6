"""What a decoder needs to know, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cfs.errors import UserError


@dataclass(frozen=True)
class Llama3Scaling:
    """The `llama3` stretch of the rotary frequencies (Llama 3.1; R1-Distill-Llama uses it)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer; `raw` is the file's content, which `save_model` writes back."""

    family: Literal["olmo", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    norm_eps: float
    tie_word_embeddings: bool
    clip_qkv: float | None
    raw: dict[str, Any] = field(repr=False, compare=False)


def read_config(path: str | Path) -> ModelConfig:
    """Read `path/config.json`. Raises `UserError` for a missing file, family or option."""
    file = Path(path) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; expected a Hugging Face model directory with config.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    try:
        return parse_config(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


OLMO_NORM_EPS = 1e-5  # fixed in the architecture; OLMo's configs do not carry it

# Options that change the arithmetic in ways not written here; any other value is refused.
REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Turn the content of a `config.json` into a `ModelConfig`; `UserError` names the bad key."""
    family = raw.get("model_type")
    if family not in ("llama", "olmo"):
        raise UserError(f"model_type {family!r} is not supported; supported: 'llama', 'olmo'")
    for key, required in REQUIRED_VALUES.items():
        if raw.get(key, required) not in (required, None):
            raise UserError(f"{key}={raw[key]!r} is not supported; only {required!r} is")

    hidden_size = _size(raw, "hidden_size")
    num_heads = _size(raw, "num_attention_heads")
    num_kv_heads = _size(raw, "num_key_value_heads", num_heads)
    head_dim = _size(raw, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"num_key_value_heads={num_kv_heads} does not divide num_attention_heads={num_heads}"
        )
    if head_dim % 2:
        raise UserError(f"head_dim={head_dim} is odd; rotary embeddings rotate pairs of channels")
    rope_theta, rope_scaling = _rope(raw)
    return ModelConfig(
        family=family,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=_size(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_size(raw, "max_position_embeddings", 2048),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=OLMO_NORM_EPS if family == "olmo" else _number(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        clip_qkv=_number(raw, "clip_qkv") if family == "olmo" and raw.get("clip_qkv") else None,
        raw=raw,
    )


def _size(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{key}={value!r}; expected a positive integer")
    return value


def _number(raw: dict[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{key}={value!r}; expected a positive number")
    return float(value)


def _rope(raw: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling={rope!r}; expected an object or null")
    theta = _number({"rope_theta": raw.get("rope_theta")} | rope, "rope_theta", 10_000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor other than 1.0 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rope_type {kind!r} is not supported; supported: 'default', 'llama3'")
    return theta, Llama3Scaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings"),
    )
