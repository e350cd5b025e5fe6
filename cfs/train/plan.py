"""The memory that a rank needs, by part, before any weight is read: of config.json alone.

Parts that stay follow from the parameters' shapes; the rest is rehearsed (`rehearsal.py`). What
`--compile` saves is not foreseen: with it the plan is an upper bound.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cfs.assets import TINYWORLD_DIR
from cfs.baselines import METHODS
from cfs.errors import UserError
from cfs.model import ModelConfig, build_model, read_config, resolve_checkpoint
from cfs.model.weights import INDEX_FILE, SINGLE_FILE, checkpoint_dtype
from cfs.train.config import TrainConfig
from cfs.train.footprint import (
    BASE,
    CHECKPOINT,
    COPY,
    MASTERS,
    MERGE,
    REFERENCE,
    STATES,
    TEACHER,
    TUNED,
    UPDATE,
    merging_bytes,
    training_moments,
)
from cfs.train.stand_ins import (
    ACTIVATIONS,
    GATHERED_GRADIENTS,
    GATHERED_WEIGHTS,
    GRADIENTS,
    HEAD,
)

GIB = 2**30
SPARE = 0.05
"""Share of a device that a plan leaves free, for what no tensor holds: the CUDA context or the
interpreter, the kernels' own workspaces, and holes between the allocator's blocks."""

# The parts in the order of the table, and what decides each.
DECIDED_BY = {
    BASE: "whole, in --dtype: scored and sampled from before training",
    MASTERS: "--masters; shared out over the ranks (--shard-ranks)",
    STATES: "--optimizer; shared out likewise",
    REFERENCE: "--method, the checkpoint's dtype; shared out likewise (--offload-reference)",
    TUNED: "--method and --tuned, likewise",
    TEACHER: "--method distill: theta* shared out, with what it gathers",
    GRADIENTS: "--masters; shared out likewise",
    GATHERED_WEIGHTS: "embedding, head and the blocks at work, whole in --dtype",
    GATHERED_GRADIENTS: "of a block, or of embedding and head: whole, summed in float32",
    ACTIVATIONS: "--micro-batch-tokens, --activation-checkpointing",
    HEAD: "a chunk of logits and the head's gradient in float32",
    UPDATE: "float32 copies of a piece of --masters bfloat16",
    MERGE: "--method and --tuned: float32, whatever the model's size is otherwise",
    COPY: "--method: its rows before the update, in float32, and what chooses among them",
    CHECKPOINT: "masters and states once more while they are written",
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank, the fullest, at the moment when it holds most.

    parts     by name, in the order of the table; they add up to the peak
    moment    when that is
    host      besides, in the memory of its host; 0 on a CPU, where it is among the parts
    remedies  where the plan does not fit: what would take less, and the peak with it
    """

    parts: dict[str, int]
    moment: str
    host: int
    num_ranks: int
    device_bytes: int
    has_first_run: bool = False
    """Does a run without the method come first, for its `--tuned`?"""
    remedies: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak <= (1 - SPARE) * self.device_bytes


def plan_run(config: TrainConfig) -> MemoryPlan:
    """The plan of the run that the flags ask for, and of its alternatives where it does not fit.

    For CUDA, which need not be here, with `--device cuda`, or with `--plan-gib` unless `--device`
    says otherwise. Raises `UserError` where the device's memory is neither known nor given.
    """
    directory = resolve_checkpoint(config.model or TINYWORLD_DIR, weights=False)
    model_config = read_config(directory)
    device_type = config.device
    if device_type == "auto":
        on_cuda = torch.cuda.is_available() or config.plan_gib is not None
        device_type = "cuda" if on_cuda else "cpu"
    num_ranks = config.plan_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    resolved = config.resolved(device_type, model_config.max_position_embeddings)
    device_bytes = _device_bytes(config, device_type)
    stored = stored_dtype(directory, model_config)

    def planned(changed: TrainConfig, ranks: int = num_ranks) -> MemoryPlan:
        return plan_memory(changed, model_config, stored, ranks, device_type, device_bytes)

    plan = planned(resolved)
    if plan.fits:
        return plan
    peaks = {
        said: planned(replace(resolved, **changes)).peak
        for said, changes in _alternatives(resolved).items()
    }
    if resolved.shard_ranks is None and device_type == "cuda":
        peaks[f"{2 * num_ranks} ranks"] = planned(resolved, 2 * num_ranks).peak
    remedies = {said: peak for said, peak in peaks.items() if peak < plan.peak}
    return replace(plan, remedies=remedies)


def plan_memory(
    config: TrainConfig,
    model_config: ModelConfig,
    stored: torch.dtype,
    num_ranks: int,
    device_type: str,
    device_bytes: int,
) -> MemoryPlan:
    """The plan of a run whose `config` is resolved.

    stored        dtype of the checkpoint
    device_bytes  memory of one rank's device
    """
    num_shards = config.shard_ranks or num_ranks
    if num_ranks % num_shards:
        raise UserError(
            f"--shard-ranks {num_shards}: {num_ranks} ranks cannot be dealt out to copies of so "
            "many; give a divisor"
        )
    is_merge = any(method.merges for method in config.methods)
    moments: dict[str, Counter[str]] = {}
    host = 0
    if not is_merge or config.tuned is None:
        moments, host = training_moments(
            config, model_config, stored, num_ranks, num_shards, device_type
        )
    if is_merge:
        num_models = 1 + len(config.tuned or [""])
        merging = merging_bytes(model_config, stored, num_models)
        moments["merging, on the host of rank 0"] = Counter({MERGE: merging})
    compute, masters = getattr(torch, config.dtype), getattr(torch, config.masters)
    whole = sum(p.numel() for p in build_model(model_config, device="meta").parameters())
    if not config.from_scratch and not (is_merge and config.kl_samples == 0):
        moments["sampling from the base model"] = Counter({BASE: compute.itemsize * whole})
    elif device_type == "cuda":
        host = max(host, masters.itemsize * whole)
    moment = max(moments, key=lambda name: moments[name].total())
    kept = [part for method in METHODS.values() for part in method.keeps]
    order = [*list(DECIDED_BY)[:5], *kept, *list(DECIDED_BY)[5:]]
    parts = {name: moments[moment][name] for name in order if moments[moment][name]}
    first_run = config.tuned is None and any(method.needs_tuned for method in config.methods)
    return MemoryPlan(parts, moment, host, num_ranks, device_bytes, first_run)


def print_plan(plan: MemoryPlan, console: Console | None = None) -> None:
    """The parts as a table, and whether they fit; if not, what would."""
    console = console or Console()
    ranks = "one rank" if plan.num_ranks == 1 else f"the fullest of {plan.num_ranks} ranks"
    table = Table(title=f"Memory of {ranks} at its peak: {plan.moment}", title_justify="left")
    table.add_column("part")
    table.add_column("memory", justify="right")
    table.add_column("decided by")
    for name, num_bytes in plan.parts.items():
        table.add_row(
            name, _shown(num_bytes), DECIDED_BY.get(name, "--method; shared out likewise")
        )
    table.add_section()
    table.add_row("together", _shown(plan.peak), "")
    console.print(table)
    if plan.has_first_run:
        console.print(
            "a first run, without the method, makes what --tuned would name: plan it apart"
        )
    if plan.host:
        console.print(f"and of its host {_shown(plan.host)}")
    device = f"{_shown(plan.device_bytes)}, of which {SPARE:.0%} are kept free"
    if plan.fits:
        console.print(f"fits in {device}")
        return
    console.print(f"does not fit in {device}")
    most = (1 - SPARE) * plan.device_bytes
    for remedy, peak in sorted(plan.remedies.items(), key=lambda item: item[1]):
        verdict = "fits" if peak <= most else "still too much"
        console.print(f"  with {remedy}: {_shown(peak)}, {verdict}")


def _shown(num_bytes: int) -> str:
    if num_bytes < GIB:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB"


def stored_dtype(directory: Path, model_config: ModelConfig) -> torch.dtype:
    """Of the checkpoint: by the headers of its files, else by config.json, else float32."""
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file():
        return checkpoint_dtype(directory)
    named = model_config.raw.get("dtype") or model_config.raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(named), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{directory / 'config.json'}: dtype {named!r}; expected one of torch's")
    return dtype


def _device_bytes(config: TrainConfig, device_type: str) -> int:
    if config.plan_gib is not None:
        return int(config.plan_gib * GIB)
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda: there is none here whose memory --plan could look up; "
                "give it as --plan-gib"
            )
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    on_this_host = config.plan_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // on_this_host


def _alternatives(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Flags not given yet that save memory, and what they change; at last all of them."""
    kinds = ("none", "selective", "block")
    thriftier = kinds[kinds.index(config.activation_checkpointing) + 1 :]
    changes: list[tuple[str, Any]] = [("activation_checkpointing", kind) for kind in thriftier]
    if config.micro_batch_tokens > config.max_length:
        half = max(config.max_length, config.micro_batch_tokens // 2)
        changes.append(("micro_batch_tokens", half))
    if config.optimizer == "adamw":
        changes.append(("optimizer", "adamw8bit"))
    if config.masters == "float32":
        changes.append(("masters", "bfloat16"))
    needs_others = any(m.needs_original or m.needs_initial or m.keeps_tuned for m in config.methods)
    if needs_others and not config.offload_reference:
        changes.append(("offload_reference", True))
    found = {_flag(name, value): {name: value} for name, value in changes}
    if len(found) > 1:
        found["all of these"] = dict(changes)
    return found


def _flag(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
