"""Fine-tune a model, by default the embedded one with context-free samples against forgetting.

    python train.py --method cfs
    torchrun --standalone --nproc-per-node 2 train.py --model DIR --data FILE --format gsm8k

A run leaves config.yaml, metrics.jsonl, training.svg, model/ and summary.json in --out.
"""

from __future__ import annotations

import json

import torch

from cfs import ranks as process_ranks
from cfs.assets import TINYWORLD_DIR
from cfs.cli import parse, run, save_yaml
from cfs.data import tinyworld
from cfs.data.formats import Example, make_examples
from cfs.data.mixture import Mixture
from cfs.data.tokenizer import Tokenizer
from cfs.eval.report import plot_training, print_summary
from cfs.eval.skills import Score, load_tasks, score_tasks
from cfs.files import write_atomically
from cfs.model import load_model, read_config, resolve_checkpoint
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.endpoints import save_result, starting_model
from cfs.train.loop import TrainResult, train
from cfs.train.parallel import shard
from cfs.train.rundir import claim_run_directory, run_facts
from cfs.train.sources import held_out_samples, synthetic_examples, task_records


def fine_tune(config: TrainConfig, ranks: Ranks) -> None:
    """One run from its flags to its table. Collective."""
    method = config.method_spec
    directory = resolve_checkpoint(config.model or TINYWORLD_DIR)
    context = read_config(directory).max_position_embeddings
    config = config.resolved(ranks.device.type, context)
    tokenizer = Tokenizer(directory)
    records = task_records(config)
    task = make_examples(records, tokenizer, config.max_length, method.all_tokens)
    config = config.counted(len(task))
    compute_dtype = getattr(torch, config.dtype)
    out = ranks.on_main(lambda: claim_run_directory(config))
    if ranks.is_main:
        cut = sum(int(example.input_ids[-1]) != tokenizer.eos_id for example in task)
        print(
            f"{method.name}: {config.steps} steps of {config.batch_size} examples -> {out}\n"
            f"{len(task)} of {len(records)} records have a response within {config.max_length} "
            f"tokens; {cut} of them are cut"
        )

    tasks = load_tasks() if config.on_tinyworld_data else []
    base_scores: dict[str, Score] = {}
    synthetic: list[Example] = []
    held_out = None
    if not method.from_scratch:
        base = load_model(directory, dtype=compute_dtype, device=ranks.device)
        if tasks:
            base_scores = score_tasks(base, tokenizer, tasks, config.skill_items, ranks)
        if method.uses_synthetic:
            count = round(config.synthetic_ratio * len(task))
            synthetic = synthetic_examples(config, directory, base, tokenizer, count, ranks)
        held_out = held_out_samples(config, directory, base, tokenizer, ranks)
        del base

    model, stored_dtype = starting_model(config, directory, ranks)
    shard(model, ranks, compute_dtype)
    mixture = Mixture(task, synthetic, config.batch_size, config.seed)
    if ranks.is_main:
        save_yaml(config, out / "config.yaml", run_facts(ranks.world_size))
    result = train(model, mixture, held_out, config, ranks, out / "metrics.jsonl")
    save_result(model, out / "model", stored_dtype, ranks)
    del model

    tuned_scores: dict[str, Score] = {}
    if tasks:
        tuned = load_model(out / "model", dtype=compute_dtype, device=ranks.device)
        tuned_scores = score_tasks(tuned, tokenizer, tasks, config.skill_items, ranks)
    if ranks.is_main:
        summary = summarise(config, result, base_scores, tuned_scores)
        write_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        plot_training(out / "metrics.jsonl", out / "training.svg")
        print_summary(summary)
        print(f"\n{out}: summary.json, metrics.jsonl, training.svg, config.yaml, model/")


def summarise(
    config: TrainConfig,
    result: TrainResult,
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
        "kl_nats": result.kl.nats if result.kl else None,
        "kl_se": result.kl.se if result.kl else None,
        "steps": result.steps,
        "targets_task": result.targets_task,
        "targets_synthetic": result.targets_synthetic,
        "train_seconds": result.train_seconds,
        "skills": skills,
        "new_skills": [name for name in skills if name == tinyworld.NEW_SKILL],
    }


def main() -> None:
    config = parse(TrainConfig, DESCRIPTION)
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
    run(main)
