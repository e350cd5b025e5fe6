"""Fine-tune a model, by default the embedded one with context-free samples against forgetting.

    python train.py --method cfs
    torchrun --standalone --nproc-per-node 2 train.py --model DIR --data FILE --format gsm8k

A run leaves config.yaml, metrics.jsonl, training.svg, model/, checkpoints/ and summary.json in
--out; interrupted, it goes on with --resume.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch

from cfs import ranks as process_ranks
from cfs.assets import TINYWORLD_DIR
from cfs.cli import given_flags, parse, run
from cfs.data import tinyworld
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.eval.report import plot_training, print_summary
from cfs.eval.skills import Score, load_tasks, score_tasks
from cfs.files import write_atomically
from cfs.model import load_model, read_config, resolve_checkpoint
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.endpoints import save_result
from cfs.train.loop import Progress, train
from cfs.train.metrics import check_loggers
from cfs.train.optim import check_optimizer
from cfs.train.plan import plan_run, print_plan
from cfs.train.prepare import prepared_run
from cfs.train.rundir import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    SUMMARY,
    claimed_run_directory,
    recalled,
    run_facts,
)
from cfs.train.sources import TaskData, held_out_samples, synthetic_examples, task_data


def fine_tune(config: TrainConfig, ranks: Ranks) -> None:
    """One run from its flags to its table. Collective."""
    flags = given_flags(TrainConfig)
    config = ranks.on_main(lambda: recalled(config, flags))
    directory = resolve_checkpoint(config.model or TINYWORLD_DIR)
    context = read_config(directory).max_position_embeddings
    config = config.resolved(ranks.device.type, context)
    check_optimizer(config.optimizer)
    tokenizer = Tokenizer(directory)
    task = task_data(config, tokenizer)
    config = config.counted(task.num_examples)
    with ExitStack() as stack:
        facts = run_facts(ranks.world_size)
        out = ranks.on_main(lambda: stack.enter_context(claimed_run_directory(config, facts)))
        if (out / SUMMARY).is_file():
            finished = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
            if ranks.is_main:
                print(f"{out}: this run is finished")
                print_summary(finished)
            return
        if ranks.is_main:
            print(
                f"{config.method}: {config.steps} steps of {config.batch_size} examples -> {out}\n"
                f"{task.num_examples} of {task.num_records} records have a response within "
                f"{config.max_length} tokens; {task.num_cut} of them are cut"
            )
        run_in(out, config, directory, tokenizer, task, ranks)


def run_in(
    out: Path,
    config: TrainConfig,
    directory: Path,
    tokenizer: Tokenizer,
    task: TaskData,
    ranks: Ranks,
) -> None:
    """Measure the base, draw what is needed, train, measure again. Collective."""
    method, compute_dtype = config.method_spec, getattr(torch, config.dtype)
    tasks = load_tasks() if config.on_tinyworld_data else []
    base_scores: dict[str, Score] = {}
    sources, held_out = task.sources, None
    if not method.from_scratch:
        base = load_model(directory, dtype=compute_dtype, device=ranks.device)
        if tasks:
            base_scores = score_tasks(base, tokenizer, tasks, config.skill_items, ranks)
        if method.uses_synthetic:
            count = round(config.synthetic_ratio * task.num_examples)
            samples = synthetic_examples(config, directory, base, tokenizer, count, ranks)
            sources = [*sources, Source("sample", samples, synthetic=True)]
        held_out = held_out_samples(config, directory, base, tokenizer, ranks)
        del base

    run = prepared_run(config, directory, sources, held_out, out, ranks)
    is_done = train(run)
    if run.metrics is not None:
        run.metrics.close()
    if not is_done:
        if ranks.is_main:
            print(
                f"stopped after step {run.progress.step} of {config.steps}, which is saved; "
                f"go on with: {Path(sys.argv[0]).name} --resume --out {out}"
            )
        return
    save_result(run.model, out / MODEL, run.result_dtype, ranks)
    progress = run.progress
    del run

    tuned_scores: dict[str, Score] = {}
    if tasks:
        tuned = load_model(out / MODEL, dtype=compute_dtype, device=ranks.device)
        tuned_scores = score_tasks(tuned, tokenizer, tasks, config.skill_items, ranks)
    if ranks.is_main:
        summary = summarise(config, progress, base_scores, tuned_scores)
        plot_training(out / METRICS, out / "training.svg")
        write_atomically(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        print_summary(summary)
        print(f"\n{out}: {SUMMARY}, {METRICS}, training.svg, {CONFIG}, {MODEL}/, {CHECKPOINTS}/")


def summarise(
    config: TrainConfig,
    progress: Progress,
    base: dict[str, Score],
    tuned: dict[str, Score],
) -> dict[str, object]:
    """The content of summary.json; skills are accuracies, in [0, 1]."""
    skills = {
        name: {
            "base": base[name].accuracy if base else None,
            "tuned": score.accuracy,
            "se": score.se,
        }
        for name, score in tuned.items()
    }
    return {
        "method": config.method,
        "seed": config.seed,
        "kl_nats": progress.kl.nats if progress.kl else None,
        "kl_se": progress.kl.se if progress.kl else None,
        "steps": progress.step,
        "targets_task": progress.targets_task,
        "targets_synthetic": progress.targets_synthetic,
        "train_seconds": progress.seconds,
        "skills": skills,
        "new_skills": [name for name in skills if name == tinyworld.NEW_SKILL],
    }


def main() -> None:
    config = parse(TrainConfig, DESCRIPTION)
    if config.plan:
        if os.environ.get("RANK", "0") == "0":
            print_plan(plan_run(config))
        return
    check_loggers(config)
    ranks = process_ranks.start(config.device)
    try:
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
