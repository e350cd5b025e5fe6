"""The sampler's speed, as ratios within one run: against `transformers`, and against the hardware.

    python bench/sampler.py                    everything that this machine can show
    python bench/sampler.py --only step exact  some of the tables

compare   useful tokens/s beside `transformers` generate at several batch sizes
step      a decode step beside its own matrix products and cache reads, and its draw
exact     samples that depend on slots or ranks
bfloat16  stored log-probabilities beside a float32 forward pass
ranks     one process with all threads beside one process a core
memory    peak memory and tokens/s over the number of TinyWorld samples
gpu       OLMo-1B and Llama-8B shapes on CUDA; "not measured" without it

Models are random (`models.py`).
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from sampler_runs import exact, memory, ranks_on_cores
from sampler_speed import bfloat16, compare, gpu, step_and_draw

TABLES: dict[str, Callable[..., None]] = {
    "compare": compare,
    "step": step_and_draw,
    "exact": exact,
    "bfloat16": bfloat16,
    "ranks": ranks_on_cores,
    "memory": memory,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--counts", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    arguments = parser.parse_args()
    console = Console(width=120)
    extra = {"compare": (arguments.batches,), "memory": (arguments.counts,)}
    for name in arguments.only:
        TABLES[name](console, *extra.get(name, ()))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
