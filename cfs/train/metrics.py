"""A line of metrics a step: in metrics.jsonl always, elsewhere where it is asked for."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cfs.data.mixture import Draw
from cfs.errors import UserError
from cfs.files import blaming, write_atomically
from cfs.model import Decoder
from cfs.model.config import ModelConfig
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig

CLOCKED = frozenset({"tokens_per_s", "mfu", "peak_gib"})
"""Metrics that no two runs share: they tell of the machine."""

# Dense bfloat16 rate without sparsity, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


class MetricsLog:
    """Writes on rank 0 alone; another rank's is never made."""

    def __init__(self, out: Path, file: Path, config: TrainConfig, first_step: int) -> None:
        """first_step  steps already taken: lines of later ones, which a run that was killed left
        behind, are dropped, as those steps will be taken again
        """
        self.file = file
        self.writer = _tensorboard(out, first_step) if config.tensorboard else None
        self.tracker = _wandb(config, out) if config.wandb is not None else None
        if file.is_file():
            kept = [line for line in _whole_lines(file) if _step_of(line, file) <= first_step]
            with blaming(file, "free some space and --resume"):
                write_atomically(file, "".join(f"{line}\n" for line in kept if first_step))

    def write(self, metrics: dict[str, Any]) -> None:
        """metrics  numbers, None where there is none; the step among them"""
        with (
            blaming(self.file, "free some space and --resume"),
            self.file.open("a", encoding="utf-8") as stream,
        ):
            stream.write(json.dumps(metrics) + "\n")
        values = {k: v for k, v in metrics.items() if k != "step" and v is not None}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, metrics["step"])
        if self.tracker is not None:
            self.tracker.log(values, step=metrics["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.finish()


def check_loggers(config: TrainConfig) -> None:
    """Refuse a logger that is not installed, before any work."""
    if config.tensorboard:
        _import_tensorboard()
    if config.wandb is not None:
        _import_wandb()


def _whole_lines(file: Path) -> list[str]:
    """Without the last where a kill cut it short."""
    text = file.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _step_of(line: str, file: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: a line is damaged ({line[:40]!r}); remove it, and --resume goes on"
        ) from error


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"--tensorboard: cannot be imported ({error}); pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"--wandb: cannot be imported ({error}); pip install wandb, or leave it out"
        ) from error
    return wandb


def _tensorboard(out: Path, first_step: int) -> Any:
    return _import_tensorboard()(str(out / "tensorboard"), purge_step=first_step + 1)


def _wandb(config: TrainConfig, out: Path) -> Any:
    # The run's directory names it, so that a resumed run goes on in the same chart.
    name = out.resolve().name
    return _import_wandb().init(
        project=config.wandb,
        name=name,
        id=name,
        resume="allow",
        dir=str(out),
        config=asdict(config),
    )


# ---------------------------------------------------------------------------------- the machine


def clocked_metrics(
    model: Decoder, draws: list[Draw], seconds: float, ranks: Ranks
) -> dict[str, float | None]:
    """Speed and memory of a step on these examples that took all ranks so long.

    tokens_per_s  of examples and samples, prompts among them, over all ranks
    mfu           share of the accelerators' dense bfloat16 rate; None where that is not known
    """
    peak = peak_flops(ranks.device)
    blocks = sum(p.numel() for p in model.layers.parameters())
    used = step_flops(model.config, blocks, draws) / seconds
    return {
        "tokens_per_s": sum(len(draw.example.input_ids) for draw in draws) / seconds,
        "mfu": None if peak is None else used / (peak * ranks.world_size),
        "peak_gib": peak_gib(ranks.device),
    }


def step_flops(model: ModelConfig, num_block_parameters: int, draws: list[Draw]) -> float:
    """Floating-point operations that the forward and backward pass of a batch need.

    num_block_parameters  of all blocks together: six operations each and token. The head takes as
                          many for targets alone, and causal attention the half of its square.
    Recomputed activations and padding count nothing: they are not needed.
    """
    lengths = [len(draw.example.input_ids) for draw in draws]
    targets = sum(draw.example.num_targets for draw in draws)
    attention = model.num_layers * model.num_heads * model.head_dim
    return (
        6.0 * num_block_parameters * sum(lengths)
        + 6.0 * model.vocab_size * model.hidden_size * targets
        + 6.0 * attention * sum(length * length for length in lengths)
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a known accelerator; None for another device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = sorted((key for key in PEAK_FLOPS if key in name), key=len)
    return PEAK_FLOPS[known[-1]] if known else None


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held so far: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
