"""LoRA's updates alone, as PEFT lays them out on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cfs.files import fsync, replacing_directory, write_atomically

ADAPTERS = (".lora_A", ".lora_B")
"""Endings of the names of parameters that no checkpoint of the base model has."""


def save_adapter(
    named: Iterable[tuple[str, Tensor]], path: str | Path, rank: int, alpha: float, base_name: str
) -> None:
    """Write the directory that `peft.PeftModel.from_pretrained(base, path)` reads, or nothing.

    named        whole parameters; those that are no adapters are passed over
    rank, alpha  of every update, which counts alpha / rank times
    base_name    the base checkpoint's directory or name on the Hub
    """
    adapters = {n: v.detach().cpu().contiguous() for n, v in named if n.endswith(ADAPTERS)}
    tensors = {f"base_model.model.model.{n}.weight": v for n, v in adapters.items()}
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    config |= {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
    config |= {"base_model_name_or_path": base_name, "fan_in_fan_out": False}
    config["target_modules"] = sorted({name.split(".")[-2] for name in adapters})
    with replacing_directory(path) as directory:
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        fsync(directory / "adapter_model.safetensors")
        write_atomically(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")
