"""Fine-tune a model, by default the embedded one with context-free samples against forgetting.

    python train.py --method cfs
    torchrun --standalone --nproc-per-node 2 train.py --model DIR --data FILE --format gsm8k
    python train.py --stages a.yaml b.yaml c.yaml

A run leaves config.yaml, metrics.jsonl, training.svg, model/, checkpoints/ and summary.json in
--out; interrupted, it goes on with --resume. `cfs/eval/experiment.py` is what a run does in order,
`cfs/train/loop.py` and `loss.py` are its steps, `cfs/baselines/` its methods.
"""

from __future__ import annotations

import os

from cfs import ranks as process_ranks
from cfs.baselines import METHODS
from cfs.cli import parse, run
from cfs.eval.experiment import fine_tune
from cfs.eval.report import print_methods
from cfs.eval.sequence import fine_tune_in_stages
from cfs.train.config import TrainConfig
from cfs.train.metrics import check_loggers
from cfs.train.plan import plan_run, print_plan


def main() -> None:
    config = parse(TrainConfig, DESCRIPTION)
    if config.list_methods or config.plan:
        if os.environ.get("RANK", "0") == "0":
            print_methods(METHODS) if config.list_methods else print_plan(plan_run(config))
        return
    check_loggers(config)
    ranks = process_ranks.start(config.device)
    try:
        if config.stages is not None:
            fine_tune_in_stages(config, ranks)
        else:
            fine_tune(config, ranks)
    finally:
        process_ranks.finish()


DESCRIPTION = (
    "Fine-tune a language model, by default with context-free samples against forgetting. "
    "With no flag: the embedded TinyWorld base learns its new skill. Passes over the data "
    "(--epochs) count the task data alone, so methods that mix samples in take the same steps."
)

if __name__ == "__main__":
    run(main, resumes="the same command with --resume and its --out", stopped=0)
