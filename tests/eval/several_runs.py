"""Runs of `fine_tune` one after the other, on however many ranks.

torchrun --nproc-per-node 2 -m tests.eval.several_runs FILE     (a JSON list of configs)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cfs import ranks as process_ranks
from cfs.cli import run
from cfs.eval.experiment import fine_tune
from cfs.train.config import TrainConfig


def main() -> None:
    ranks = process_ranks.start("cpu")
    for config in json.loads(Path(sys.argv[1]).read_text()):
        assert fine_tune(TrainConfig(**config), ranks, flags=set())
    process_ranks.finish()


if __name__ == "__main__":
    run(main)
