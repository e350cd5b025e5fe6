"""Full-parameter training of OLMo-1B and Llama-8B shapes on one CUDA device.

Random weights are made on the device and the examples are synthetic: no file is read.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from models import columns, config_of
from rich.console import Console

from cfs.baselines import Setting
from cfs.baselines.l2 import L2
from cfs.data.formats import make_example
from cfs.data.mixture import Mixture, Source
from cfs.model import build_model
from cfs.model.config import parse_config
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.loop import Run, take_step
from cfs.train.optim import ShardedAdamW
from cfs.train.parallel import (
    LocalShard,
    checkpoint_activations,
    compile_blocks,
    local_shards,
    shard,
)
from cfs.train.reference import stored_rows
from cfs.train.stopping import StopRequest

STEP_TOKENS, WARM_UP_STEPS, STEPS = 2**17, 2, 4
INIT_STD = 0.02


@dataclass(frozen=True)
class Case:
    """A row of the table and what it should reach."""

    shape: str
    length: int
    micro_batch_tokens: int
    tokens_per_s: float
    mfu: float


CASES = (
    Case("olmo-1b", 512, 16384, 60_000, 0.45),
    Case("olmo-1b", 1024, 16384, 60_000, 0.45),
    Case("llama-8b", 1024, 4096, 10_500, 0.50),
)


class StartingPoint:
    """theta* of weights that no file holds: where the shards are now, in bfloat16.

    Stands in for `cfs.model.weights.StoredWeights`.
    """

    dtype = torch.bfloat16

    def __init__(self, shards: list[LocalShard]) -> None:
        self.shards = {shard.name: shard for shard in shards}

    def read(self, name: str, _rows: slice) -> torch.Tensor:
        return self.shards[name].local.to(self.dtype)


def shape_config(shape: str) -> dict[str, Any]:
    """The content of config.json; OLMo-1B's head is its embedding, Llama-8B's is not."""
    return config_of(shape) | {"tie_word_embeddings": shape.startswith("olmo")}


def train_config(case: Case, device: torch.device, **flags: Any) -> TrainConfig:
    given: dict[str, Any] = {
        "method": "ft",
        "model": case.shape,
        "optimizer": "adamw8bit",
        "steps": 2 * (WARM_UP_STEPS + STEPS),
        "batch_size": STEP_TOKENS // case.length,
        "max_length": case.length,
        "micro_batch_tokens": case.micro_batch_tokens,
    }
    config = TrainConfig(**(given | flags))
    return config.resolved(device.type, context=2048).counted(config.batch_size)


def random_run(case: Case, config: TrainConfig, device: torch.device) -> Run:
    """As `cfs.train.prepare` builds it, but of random weights; every token is a target."""
    ranks = Ranks(rank=0, world_size=1, device=device)
    model_config = parse_config(shape_config(case.shape))
    model = build_model(model_config, device="meta").to(getattr(torch, config.masters))
    checkpoint_activations(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)
    shard(model, ranks, getattr(torch, config.dtype))
    model.to_empty(device=device)
    shards = local_shards(model)
    generator = torch.Generator(device).manual_seed(0)
    for piece in shards:
        if piece.local.ndim == 1:
            piece.local.fill_(1.0)
        else:
            piece.local.normal_(0.0, INIT_STD, generator=generator)
    rng = np.random.default_rng(0)
    texts = rng.integers(1, model_config.vocab_size, (config.batch_size, case.length))
    source = Source("text", [make_example(text, first_target=1) for text in texts])
    adamw = ShardedAdamW(shards, config.optimizer, 0.0, config.beta2, config.seed)
    mixture = Mixture([source], config.batch_size, config.seed)
    return Run(config, ranks, model, shards, adamw, mixture)


def measured(run: Run) -> dict[str, float]:
    """Medians of some steps after a few to warm up, and the peak."""
    steps = [take_step(run, step, StopRequest())[0] for step in range(WARM_UP_STEPS + STEPS)]
    timed = steps[WARM_UP_STEPS:]
    return {
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in timed),
        "mfu": statistics.median(step["mfu"] or 0.0 for step in timed),
        "peak_gib": timed[-1]["peak_gib"],
    }


def planned_gib(case: Case, config: TrainConfig, device: torch.device) -> float:
    from cfs.train.plan import plan_memory

    total = torch.cuda.get_device_properties(device).total_memory
    model_config = parse_config(shape_config(case.shape))
    plan = plan_memory(config, model_config, StartingPoint.dtype, 1, device.type, total)
    return plan.peak / 2**30


def penalty_towards(run: Run) -> L2:
    """The l2 penalty towards where the run stands."""
    anchors = stored_rows(run.shards, StartingPoint(run.shards))  # type: ignore[arg-type]
    penalty = L2(l2=1e-2)
    penalty.begin(Setting(run.shards, anchors, [], [], run.ranks.sum, run.config.steps))
    return penalty


def gpu(console: Console, compiled: bool = False) -> None:
    """Each case without the penalty towards theta*, then with it."""
    table = columns(
        "Full-parameter training with 8-bit AdamW on one GPU, bfloat16, packed, all tokens targets",
        ("model", "length", "l2", "tokens/s", "target", "MFU", "target", "peak GiB", "planned"),
    )
    for case in CASES:
        goals = (f"{case.tokens_per_s:,.0f}", f"{case.mfu:.0%}")
        if not torch.cuda.is_available():
            table.add_row(
                case.shape, str(case.length), "", "not measured", goals[0], "", goals[1], "", ""
            )
            continue
        device = torch.device("cuda", torch.cuda.current_device())
        config = train_config(case, device, compile=compiled)
        run = random_run(case, config, device)
        for l2 in (0.0, 1e-2):
            run.config = replace(config, l2=l2)
            if l2:
                run.methods = [penalty_towards(run)]
            torch.cuda.reset_peak_memory_stats(device)
            found = measured(run)
            table.add_row(
                case.shape, str(case.length), "yes" if l2 else "no",
                f"{found['tokens_per_s']:,.0f}", goals[0], f"{found['mfu']:.1%}", goals[1],
                f"{found['peak_gib']:.1f}", f"{planned_gib(case, run.config, device):.1f}",
            )  # fmt: skip
        del run
        gc.collect()
        torch.cuda.empty_cache()
    console.print(table)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
