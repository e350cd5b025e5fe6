"""Every method that trains, a few steps of each, on however many ranks.

torchrun --nproc-per-node 2 -m tests.baselines.every_method DIRECTORY
torchrun --nproc-per-node 4 -m tests.baselines.every_method DIRECTORY RANKS_PER_COPY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.ranks import Ranks
from cfs.train.loop import Run, train
from tests.train.runs import make_run, tuned_model, weights

STEPS = 6
# A case is a method of that name, unless it names another. Methods that differ only in what stands
# beside the task's examples train as cfs does; tests/eval/test_experiment.py has them.
CASES: dict[str, dict[str, Any]] = {
    "ft": {},
    "cfs": {},
    "l2": {"l2": 0.1},
    "l2-init": {"l2_init": 0.1},
    "ewc": {"ewc": 10.0, "fisher_samples": 16},
    "mofo": {"mofo_fraction": 0.2},
    "lota": {"lota_sparsity": 0.7},
    "sfa": {"sfa_every": 0.34},
    "hma": {"hma_blocks": 2, "hma_lr": 0.5},
    "lora": {"lora_rank": 3, "lr": 1e-2},
    "distill": {"distill": 0.5},
    "freeze": {"freeze": "embeddings,layers:0-0"},
    "l2+mofo+sfa+distill+cfs": {"l2": 0.1},
    "mofo, 8-bit": {"method": "mofo", "optimizer": "adamw8bit"},
    "lota, 8-bit": {"method": "lota", "optimizer": "adamw8bit"},
    "sfa, bfloat16": {"method": "sfa", "sfa_every": 0.34, "masters": "bfloat16"},
    "l2, 8-bit": {"method": "l2", "l2": 0.1, "optimizer": "adamw8bit"},
    "l2, 8-bit, bfloat16": {
        "method": "l2",
        "l2": 0.1,
        "optimizer": "adamw8bit",
        "masters": "bfloat16",
    },
}
# What sums over the ranks of one copy, which several copies would count several times.
COPIED = ("l2", "ewc", "hma", "mofo", "lota", "lora")


def case_run(place: Path, name: str, case: str, ranks: Ranks, **changes: object) -> Run:
    """A run of the case in `place/name`."""
    flags: dict[str, object] = {"method": case, "steps": STEPS, "l2": None, "save_every": 2}
    flags |= CASES[case] | changes
    if flags["method"] in ("lota", "hma"):
        flags["tuned"] = [str(tuned_model(place))]
    return make_run(place, name, ranks, **flags)


def train_all(place: Path, cases: Iterable[str], ranks: Ranks, **changes: object) -> None:
    """Leave each case's losses, gradient norms and weights, first and last, in `place`."""
    for case in cases:
        name = f"{case}-{ranks.world_size}"
        run = case_run(place, name, case, ranks, **changes)
        start = weights(run)
        train(run)
        found = weights(run)
        if ranks.is_main:
            assert run.metrics is not None
            lines = [json.loads(line) for line in run.metrics.file.read_text().splitlines()]
            taken = [[line["loss"], line["grad_norm"]] for line in lines[1:]]
            (place / f"{name}.json").write_text(json.dumps(taken))
            save_file(start, place / f"{name}-start.safetensors")
            save_file(found, place / f"{name}.safetensors")


def main() -> None:
    ranks = process_ranks.start("cpu")
    place, *per_copy = sys.argv[1:]
    if per_copy:
        train_all(Path(place), COPIED, ranks, shard_ranks=int(per_copy[0]))
    else:
        train_all(Path(place), CASES, ranks)
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
