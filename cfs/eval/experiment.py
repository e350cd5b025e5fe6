"""One run from its flags to its table: measure the base, draw, train or merge, measure again."""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfs.assets import TINYWORLD_DIR
from cfs.cli import given_flags
from cfs.data.formats import Example
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.eval.report import plot_training, print_summary
from cfs.eval.skills import Score, Task, load_tasks, score_tasks
from cfs.eval.summary import Measured, summarise
from cfs.files import write_atomically
from cfs.model import Decoder, load_model, read_config, resolve_checkpoint
from cfs.model.merging import merge_checkpoints
from cfs.model.weights import checkpoint_dtype
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.draws import Draws
from cfs.train.endpoints import save_result
from cfs.train.footprint import training_bytes
from cfs.train.kl import HeldOutSamples, estimate_kl
from cfs.train.loop import Progress, train
from cfs.train.mixing import mixed_sources
from cfs.train.optim import check_optimizer
from cfs.train.prepare import check_models, prepared_run
from cfs.train.rundir import (
    CHANGEABLE,
    METRICS,
    MODEL,
    SUMMARY,
    check_holds_run,
    claimed_run_directory,
    recalled,
    run_facts,
)
from cfs.train.sources import (
    TaskData,
    fisher_samples,
    held_out_samples,
    mean_nlls,
    task_data,
    weighted,
)

TUNED, MODELS = "tuned", "models"
"""Within a run directory: the run that gives a method its fine-tuned model, and the models of a
sweep but for the first."""


@dataclass(frozen=True)
class Experiment:
    """A run that has its directory.

    config     resolved and counted
    directory  the checkpoint it starts from, theta*
    tasks      of which skills are scored
    """

    config: TrainConfig
    out: Path
    directory: Path
    tokenizer: Tokenizer
    task: TaskData
    tasks: list[Task]
    ranks: Ranks

    def load(self, directory: Path) -> Decoder:
        """A whole model, to score or to sample from."""
        dtype = getattr(torch, self.config.dtype)
        return load_model(directory, dtype=dtype, device=self.ranks.device)

    def score(self, model: Decoder) -> dict[str, Score]:
        items = self.config.skill_items
        if not self.tasks:
            return {}
        return score_tasks(model, self.tokenizer, self.tasks, items, self.ranks)


def fine_tune(config: TrainConfig, ranks: Ranks, flags: set[str] | None = None) -> bool:
    """One run; False where it was stopped before its end. Collective.

    flags  the fields that were given; by default those of the command line
    """
    given = given_flags(TrainConfig) if flags is None else flags
    if flags is None and given == {"resume", "out"}:
        ranks.on_main(lambda: check_holds_run(config))
    config = ranks.on_main(lambda: recalled(config, given))
    directory = resolve_checkpoint(config.model or TINYWORLD_DIR)
    context = read_config(directory).max_position_embeddings
    config = config.resolved(ranks.device.type, context)
    check_optimizer(config.optimizer)
    check_models(config, directory)
    tokenizer = Tokenizer(directory)
    only_merges = config.tuned is not None and any(m.merges for m in config.methods)
    task = TaskData([], 0, 0) if only_merges else task_data(config, tokenizer)
    config = config.counted(task.num_examples)
    with ExitStack() as stack:
        facts = run_facts(ranks.world_size)
        out = ranks.on_main(lambda: stack.enter_context(claimed_run_directory(config, facts)))
        if (out / SUMMARY).is_file():
            if ranks.is_main:
                print(f"{out}: this run is finished")
                print_summary(json.loads((out / SUMMARY).read_text(encoding="utf-8")))
            return True
        tasks = load_tasks(new_skills=config.scored_skills) if config.on_tinyworld_data else []
        experiment = Experiment(config, out, directory, tokenizer, task, tasks, ranks)
        if ranks.is_main:
            _announce(experiment)
        if config.tuned is None and any(m.needs_tuned for m in config.methods):
            here = {"out", "resume"} | (given & CHANGEABLE)
            if not fine_tune(_first_run(config, out), ranks, flags=here):
                _say_how_to_resume(experiment, "its first part, in " + str(out / TUNED))
                return False
            tuned = [str(out / TUNED / MODEL)]
            experiment = replace(experiment, config=replace(config, tuned=tuned))
        return _run(experiment)


def _announce(experiment: Experiment) -> None:
    config, task = experiment.config, experiment.task
    if not task.sources:
        print(f"{config.method}: of {', '.join(config.tuned or [])} -> {experiment.out}")
        others = [m.name for m in config.methods if not m.merges]
        if others:
            print(
                f"nothing is trained: what --tuned names stands for what {', '.join(others)} gives"
            )
        return
    print(
        f"{config.method}: {config.steps} steps of {config.batch_size} examples -> "
        f"{experiment.out}\n{task.num_examples} of {task.num_records} records have a response "
        f"within {config.max_length} tokens; {task.num_cut} of them are cut"
    )


def _first_run(config: TrainConfig, out: Path) -> TrainConfig:
    """The run that gives a method its `--tuned`: the same one without the methods that need it.

    What is merged is the result of all others, such as lota, whose own first run is then inside it.
    """
    needy = [m for m in config.methods if m.needs_tuned]
    # A method that compares weights must not compare what a narrower dtype made of them.
    dtype = config.result_dtype if any(m.merges for m in needy) else config.masters
    removed = [m for m in needy if m.merges] or needy
    kept = [name for name in config.method.split("+") if name not in {m.name for m in removed}]
    options: dict[str, Any] = {its.name: None for m in removed for its in m.options()}
    return replace(
        config,
        method="+".join(kept) or "ft",
        out=str(out / TUNED),
        resume=True,
        result_dtype=dtype,
        **options,
    )


def _run(experiment: Experiment) -> bool:
    """Measure the base, train or merge, measure again. Collective; False where it was stopped."""
    started = time.monotonic()
    prepare_seconds = 0.0
    config, ranks, out = experiment.config, experiment.ranks, experiment.out
    base_scores: dict[str, Score] = {}
    prepared = _Prepared(experiment.task.sources, None, None)
    is_measured = bool(experiment.tasks) or config.kl_samples > 0
    is_merge = any(method.merges for method in config.methods)
    if not config.from_scratch and (is_measured or not is_merge):
        base = experiment.load(experiment.directory)
        base_scores = experiment.score(base)
        prepare_seconds = -time.monotonic()
        prepared = _prepare(experiment, base, is_merge)
        prepare_seconds += time.monotonic()
        del base
    if is_merge:
        progress, results = Progress(), _merge(experiment, prepared)
    else:
        progress = _train(experiment, prepared)
        if progress is None:
            return False
        skills = experiment.score(experiment.load(out / MODEL)) if experiment.tasks else {}
        results = {"": Measured(skills, progress.kl)}
    if ranks.is_main:
        costs = {
            "prepare_seconds": prepare_seconds,
            "seconds": time.monotonic() - started,
            "plan_bytes": None if is_merge else _planned(experiment),
        }
        summary = summarise(config, progress, base_scores, results) | costs
        if not is_merge:
            plot_training(out / METRICS, out / "training.svg")
        write_atomically(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
        print_summary(summary)
        print(f"\n{out}: {', '.join(sorted(f.name for f in out.iterdir() if f.name[0] != '.'))}")
    return True


@dataclass(frozen=True)
class _Prepared:
    """What a run needs of its base before training; `fisher` are samples for its Fisher
    information."""

    sources: list[Source]
    held_out: HeldOutSamples | None
    fisher: list[Example] | None


def _prepare(experiment: Experiment, base: Decoder, is_merge: bool) -> _Prepared:
    config, directory = experiment.config, experiment.directory
    tokenizer, ranks = experiment.tokenizer, experiment.ranks
    sources, fisher, held_out = experiment.task.sources, None, None
    if config.kl_samples > 0:
        held_out = held_out_samples(config, directory, base, tokenizer, ranks)
    if is_merge:
        return _Prepared(sources, held_out, None)
    draws = Draws(Path(config.corpora), directory, base, tokenizer, ranks)
    added = mixed_sources(config, draws, sources)
    for method in config.methods:
        if method.weighs_examples:
            nlls = np.concatenate(mean_nlls(base, sources, config, ranks))
            sources = weighted(sources, method.example_weights(nlls))
        if count := method.num_fisher_samples:
            fisher = fisher_samples(config, directory, base, tokenizer, count, ranks)
    return _Prepared([*sources, *added], held_out, fisher)


def _train(experiment: Experiment, prepared: _Prepared) -> Progress | None:
    """Train and write the model; None where the run was stopped before its end."""
    config, out, ranks = experiment.config, experiment.out, experiment.ranks
    run = prepared_run(
        config, experiment.directory, prepared.sources, prepared.held_out, out, ranks,
        prepared.fisher,
    )  # fmt: skip
    is_done = train(run)
    if run.metrics is not None:
        run.metrics.close()
    if not is_done:
        what = f"step {run.progress.step} of {config.steps}, which is saved"
        _say_how_to_resume(experiment, what)
        return None
    save_result(run.model, out / MODEL, run.result_dtype, ranks, run.methods)
    progress = run.progress
    del run
    gc.collect()  # FSDP's modules hold each other, and their weights
    return progress


def _merge(experiment: Experiment, prepared: _Prepared) -> dict[str, Measured]:
    """Make and measure the model of each variant: model/ is the first, the others in models/."""
    config, out, ranks = experiment.config, experiment.out, experiment.ranks
    (method,) = (m for m in config.methods if m.merges)
    tuned = [resolve_checkpoint(name) for name in config.tuned or []]
    results = {}
    for number, variant in enumerate(method.variants()):
        place = out / MODEL if number == 0 else out / MODELS / variant

        def merge(number: int = number, place: Path = place) -> None:
            def merged(_name: str, original: torch.Tensor, others: list[torch.Tensor]) -> Any:
                return method.merged(number, original, others)

            if not place.is_dir():
                merge_checkpoints(experiment.directory, tuned, place, merged)

        ranks.on_main(merge)
        kl, skills = None, {}
        if experiment.tasks or prepared.held_out is not None:
            model = experiment.load(place)
            skills = experiment.score(model)
            if prepared.held_out is not None:
                kl = estimate_kl(model, prepared.held_out, config.micro_batch_tokens, ranks)
        results[variant] = Measured(skills, kl)
    return results


def _say_how_to_resume(experiment: Experiment, what: str) -> None:
    if experiment.ranks.is_main:
        print(
            f"stopped after {what}; go on with: "
            f"{Path(sys.argv[0]).name} --resume --out {experiment.out}"
        )


def _planned(experiment: Experiment) -> int:
    """Bytes that the plan foresees for training on one rank."""
    stored, ranks = checkpoint_dtype(experiment.directory), experiment.ranks
    model = read_config(experiment.directory)
    return training_bytes(experiment.config, model, stored, ranks.world_size, ranks.device.type)
