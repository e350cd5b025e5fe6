"""The memory that `train.py --plan` foretells beside the peaks of real runs, on a CPU.

    python bench/plan.py                  all cases
    python bench/plan.py --only 2-ranks   those whose name contains one of the words

Each case trains a random model for a few steps in processes of its own, on random examples that
fill their micro-batches. Measured is the growth of resident memory from just before the model is
built to its highest, on rank 0. The C library is told to give back what is freed
(`MALLOC_MMAP_THRESHOLD_`): by its own defaults it keeps some, which no plan can know; the last
column is the same run with those defaults. No checkpoint is written, and the plan's copy for it is
left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import config_of
from rich.console import Console
from rich.table import Table

from cfs import ranks as process_ranks
from cfs.cli import run as run_entry_point
from cfs.data.formats import Example
from cfs.data.mixture import Source
from cfs.model import build_model, read_config, save_model
from cfs.model.config import parse_config
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.loop import Run, train
from cfs.train.plan import CHECKPOINT, plan_memory, stored_dtype
from cfs.train.prepare import prepared_run

ROOT = Path(__file__).parent.parent
MIB = 2**20
STEPS, LENGTH = 2, 256
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
SHAPES = ("warm-up", "olmo-50304", "llama-125m")
# Name: shape, ranks, and what differs from float32, AdamW and 1,024 tokens a micro-batch.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "olmo": ("olmo-50304", 1, {}),
    "olmo-2048-tokens": ("olmo-50304", 1, {"micro_batch_tokens": 2048}),
    "olmo-adamw8bit": ("olmo-50304", 1, {"optimizer": "adamw8bit"}),
    "olmo-l2": ("olmo-50304", 1, {"l2": 0.1}),
    "olmo-selective": ("olmo-50304", 1, {"activation_checkpointing": "selective"}),
    "olmo-block": ("olmo-50304", 1, {"activation_checkpointing": "block"}),
    "olmo-bfloat16": ("olmo-50304", 1, {"dtype": "bfloat16"}),
    "olmo-bfloat16-masters": ("olmo-50304", 1, {"dtype": "bfloat16", "masters": "bfloat16"}),
    "olmo-2-ranks": ("olmo-50304", 2, {}),
    "olmo-2-ranks-one-micro-batch": ("olmo-50304", 2, {"batch_size": 8}),
    "olmo-2-ranks-2-copies": ("olmo-50304", 2, {"shard_ranks": 1}),
    "olmo-2-ranks-short": ("olmo-50304", 2, {"micro_batch_tokens": LENGTH, "batch_size": 4}),
    "olmo-2-ranks-bfloat16-block-adamw8bit-l2": (
        "olmo-50304",
        2,
        {
            "dtype": "bfloat16",
            "activation_checkpointing": "block",
            "optimizer": "adamw8bit",
            "l2": 0.1,
        },
    ),
    "llama": ("llama-125m", 1, {}),
    "llama-bfloat16": ("llama-125m", 1, {"dtype": "bfloat16"}),
    "llama-2-ranks": ("llama-125m", 2, {}),
}  # fmt: skip


def resolved(directory: Path, num_ranks: int, changes: dict[str, Any]) -> TrainConfig:
    """Two full micro-batches a rank and step, unless `changes` say otherwise."""
    settings = {
        "dtype": "float32",
        "micro_batch_tokens": 4 * LENGTH,
        "optimizer": "adamw",
    } | changes
    settings.setdefault("batch_size", 2 * num_ranks * settings["micro_batch_tokens"] // LENGTH)
    config = TrainConfig(
        method="ft", model=str(directory), steps=STEPS, max_length=LENGTH, **settings
    )
    return config.resolved("cpu", LENGTH).counted(config.batch_size)


def trained_run(config: TrainConfig, directory: Path, ranks: Ranks) -> Run:
    """A run put together as `train.py` does, and taken to its end."""
    rng = np.random.default_rng(0)
    vocabulary = read_config(directory).vocab_size
    target_mask = np.arange(LENGTH) > 0
    examples = [
        Example(rng.integers(vocabulary, size=LENGTH), target_mask, number)
        for number in range(config.batch_size)
    ]
    run = prepared_run(config, directory, [Source("row", examples)], None, directory, ranks)
    run.checkpoints = None  # its copy is left out
    train(run)
    return run


def measure(case: str, directory: Path, out: Path) -> None:
    """In a process of its own: bytes that the case needed at its peak, written to `out`."""
    torch.set_num_threads(1)
    _, num_ranks, changes = CASES[case]
    ranks = process_ranks.start("cpu")
    warm = directory / "warm-up"
    trained_run(resolved(warm, num_ranks, changes), warm, ranks)  # loads every library
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    model = directory / CASES[case][0]
    run = trained_run(resolved(model, num_ranks, changes), model, ranks)
    if ranks.is_main:
        out.write_text(str(resident("VmHWM") - before))
    ranks.wait()
    del run


def resident(what: str) -> int:
    """Bytes of this process, by the kernel's name for them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def measured(case: str, directory: Path, environment: dict[str, str]) -> int:
    num_ranks, out = CASES[case][1], directory / "measured"
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    subprocess.run(
        [*command, __file__, "--measure", case, str(directory), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return int(out.read_text())


def planned(case: str, directory: Path) -> tuple[int, str]:
    """Bytes, and the moment of the peak."""
    shape, num_ranks, changes = CASES[case]
    model_config = read_config(directory / shape)
    config = resolved(directory / shape, num_ranks, changes)
    stored = stored_dtype(directory / shape, model_config)
    plan = plan_memory(config, model_config, stored, num_ranks, "cpu", 1)
    return plan.peak - plan.parts[CHECKPOINT], plan.moment


def save_shapes(directory: Path) -> None:
    """A random model of each shape."""
    for name in SHAPES:
        raw = config_of(name) | {"max_position_embeddings": LENGTH}
        model = build_model(parse_config(raw))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.02)
        save_model(model, directory / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, directory, out = arguments.measure
        measure(case, Path(directory), Path(out))
        return
    table = Table(title="Peak memory of a rank, MiB", title_justify="left")
    for column in ("case", "planned", "measured", "planned / measured", "C library's defaults"):
        table.add_column(column, justify="left" if column == "case" else "right")
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_shapes(directory)
        for case in CASES:
            if not any(word in case for word in arguments.only):
                continue
            plan, _ = planned(case, directory)
            peak, kept = (measured(case, directory, e) for e in (GIVING_BACK, {}))
            table.add_row(
                case, f"{plan / MIB:,.0f}", f"{peak / MIB:,.0f}", f"{plan / peak:.3f}",
                f"{kept / MIB:,.0f}",
            )  # fmt: skip
            results[case] = [plan, peak, kept]
    console = Console(width=120)
    console.print(table)
    console.print(f"torch {torch.__version__}; bytes: {json.dumps(results)}")


if __name__ == "__main__":
    run_entry_point(main)
