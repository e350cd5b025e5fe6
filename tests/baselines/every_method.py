"""Every method that trains, a few steps of each, on however many ranks.

torchrun --nproc-per-node 2 -m tests.baselines.every_method DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.ranks import Ranks
from cfs.train.loop import Run, train
from tests.train.runs import make_run, tuned_model, weights

STEPS = 6
# Those that differ only in what stands beside the task's examples train as cfs does.
METHODS: dict[str, dict[str, Any]] = {
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
}


def method_run(place: Path, name: str, method: str, ranks: Ranks, **changes: object) -> Run:
    """A run of the method in `place/name`."""
    tuned = {"tuned": [str(tuned_model(place))]} if method in ("lota", "hma") else {}
    flags: dict[str, object] = {"method": method, "steps": STEPS, "l2": None, "save_every": 2}
    return make_run(place, name, ranks, **(flags | METHODS[method] | tuned | changes))


def main() -> None:
    ranks = process_ranks.start("cpu")
    place = Path(sys.argv[1])
    losses = {}
    for method in METHODS:
        run = method_run(place, f"{method}-{ranks.world_size}", method, ranks)
        start = weights(run)
        train(run)
        found = weights(run)
        if ranks.is_main:
            save_file(start, place / f"{method}-start.safetensors")
            assert run.metrics is not None
            lines = run.metrics.file.read_text().splitlines()
            losses[method] = [json.loads(line)["loss"] for line in lines[1:]]
            save_file(found, place / f"{method}-{ranks.world_size}.safetensors")
    if ranks.is_main:
        print(json.dumps(losses))
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
