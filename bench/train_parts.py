"""Shares of a training step: the l2 penalty, the KL estimate, the optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from models import columns, config_of
from rich.console import Console
from train_runs import prepared

from cfs.assets import TINYWORLD_DIR
from cfs.data.formats import Example, make_example
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.model import build_model, load_model
from cfs.model.config import parse_config
from cfs.ranks import Ranks
from cfs.sample.sample import Request, SamplingSettings
from cfs.sample.sampler import generate
from cfs.train.config import CHECKPOINT_DEFAULTS, TrainConfig
from cfs.train.kl import HeldOutSamples, estimate_kl
from cfs.train.loop import Run, take_step
from cfs.train.optim import ShardedAdamW, init_weights
from cfs.train.parallel import local_shards
from cfs.train.prepare import prepared_run
from cfs.train.sources import task_data
from cfs.train.stopping import StopRequest

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
CPU_MICRO_BATCH = 2048
L2_PAIRS, OPTIMIZER_STEPS = 6, 5
CHECKPOINT_STEPS, CHECKPOINT_LENGTH, VOCABULARY = 1000, 512, 50280


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def step_seconds(run: Run, step: int) -> float:
    return seconds(lambda: take_step(run, step, StopRequest()))


# ------------------------------------------------------------------------------------------ l2


def l2(console: Console, place: Path) -> None:
    """Pairs of steps on one batch, now one first and now the other; the first pair warms up."""
    penalised = prepared(place, "l2", L2_PAIRS + 1, "float32", CPU_MICRO_BATCH, l2=1e-2)
    plain = replace(penalised, config=replace(penalised.config, l2=0.0), methods=[])
    pairs = []
    for step in range(L2_PAIRS + 1):
        runs = (penalised, plain) if step % 2 else (plain, penalised)
        times = {id(run): step_seconds(run, step) for run in runs}
        pairs.append((times[id(penalised)], times[id(plain)]))
    penalised.metrics.close()
    ratios = [100 * (penalised_s / plain_s - 1) for penalised_s, plain_s in pairs[1:]]
    adding = statistics.median(seconds(lambda: add_l2(penalised)) for _ in range(L2_PAIRS))
    with_l2, without = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    table = columns(
        f"A step with the l2 penalty beside one without, {L2_PAIRS} pairs, theta* resident",
        (
            "s/step with",
            "without",
            "difference",
            "lowest",
            "highest",
            "penalty alone s",
            "of a step",
            "target",
        ),
    )
    table.add_row(
        f"{with_l2:.2f}",
        f"{without:.2f}",
        *(f"{x:+.1f} %" for x in (statistics.median(ratios), min(ratios), max(ratios))),
        f"{adding:.3f}",
        f"{adding / without:.1%}",
        "<= 5 %",
    )
    console.print(table)


def add_l2(run: Run) -> None:
    """The penalty's own work, into gradients that are there."""
    for shard in run.shards:
        if shard.parameter.grad is None:
            shard.parameter.grad = torch.zeros_like(shard.parameter)
    for method in run.methods:
        method.before_step(0)


# ------------------------------------------------------------------------------------------ kl


def kl(console: Console, place: Path) -> None:
    """An estimate before the first step and one every tenth of the run, beside its steps."""
    table = columns(
        "Share of a run that the KL estimates take, at the defaults of train.py",
        ("run", "samples", "batch", "steps between", "s/estimate", "s/step", "share", "target"),
    )
    runs = {"real checkpoint": checkpoint_run(place), "TinyWorld": tinyworld_run(place)}
    for name, (run, num_steps, num_estimates) in runs.items():
        config, held_out = run.config, run.held_out
        assert held_out is not None, "a KL needs samples"
        steps = [step_seconds(run, step) for step in range(1 + num_steps)][1:]

        def estimate(run: Run = run, held_out: HeldOutSamples = held_out) -> None:
            estimate_kl(run.model, held_out, run.config.micro_batch_tokens, run.ranks)

        once = statistics.median(seconds(estimate) for _ in range(num_estimates))
        step = statistics.median(steps)
        estimating = (1 + config.steps // config.kl_every) * once
        share = estimating / (estimating + config.steps * step)
        table.add_row(
            name, str(len(held_out.examples)), str(config.batch_size), str(config.kl_every),
            f"{once:.2f}", f"{step:.2f}", f"{share:.1%}", "<= 3 %",
        )  # fmt: skip
    console.print(table)


def checkpoint_run(place: Path) -> tuple[Run, int, int]:
    """Task examples and as many samples, which are as long as they may be: the dearest case."""
    rng = np.random.default_rng(0)
    texts = [random_text(rng) for _ in range(TrainConfig().kl_samples)]
    run = prepared(
        place,
        "kl",
        CHECKPOINT_STEPS,
        "float32",
        CPU_MICRO_BATCH,
        batch_size=CHECKPOINT_DEFAULTS["batch_size"],
    )
    (task,) = run.mixture.sources
    samples = Source("sample", texts, synthetic=True, per_epoch=len(task.examples))
    mixture = replace(run.mixture, sources=[task, samples])
    held_out = HeldOutSamples(texts, np.zeros(len(texts)))
    return replace(run, mixture=mixture, held_out=held_out), 2, 1


def random_text(rng: np.random.Generator) -> Example:
    return make_example(rng.integers(1, VOCABULARY, CHECKPOINT_LENGTH), first_target=1)


def tinyworld_run(place: Path) -> tuple[Run, int, int]:
    """The embedded model, its task, and samples of its own."""
    config = TrainConfig(out=str(place / "tinyworld")).resolved("cpu", context=256)
    tokenizer = Tokenizer(TINYWORLD_DIR)
    task = task_data(config, tokenizer)
    requests = [Request(i, [tokenizer.seed_id]) for i in range(config.kl_samples)]
    settings = SamplingSettings(config.max_length - 1, temperature=1.0, top_p=1.0, seed=0)
    model = load_model(TINYWORLD_DIR)
    drawn = list(generate(model, requests, settings, tokenizer.eos_id, tokenizer.num_tokens, 256))
    texts = [make_example(sample.input_ids, sample.num_prompt_tokens) for sample in drawn]
    held_out = HeldOutSamples(texts, np.array([s.logprob_model.sum() for s in drawn]))
    sources = [*task.sources, Source("sample", texts, synthetic=True, per_epoch=task.num_examples)]
    (place / "tinyworld").mkdir()
    run = prepared_run(
        config.counted(task.num_examples), TINYWORLD_DIR, sources, held_out, place / "tinyworld",
        ALONE,
    )  # fmt: skip
    run.checkpoints = None
    return run, 30, 3


# ----------------------------------------------------------------------------------- optimizer


def optimizer(console: Console) -> None:
    """Steps of all kinds take turns over random gradients; each has a model of its own."""
    config = parse_config(config_of("olmo-50304") | {"tie_word_embeddings": True})
    kinds = [
        (kind, masters)
        for kind in ("adamw", "adamw8bit")
        for masters in (torch.float32, torch.bfloat16)
    ]
    optimizers = {}
    for kind, masters in kinds:
        model = build_model(config)
        init_weights(model, seed=0)
        shards = local_shards(model.to(masters))
        optimizers[kind, masters] = (shards, ShardedAdamW(shards, kind, 0.0, 0.999, seed=0))
    times: dict[tuple[str, torch.dtype], list[float]] = {name: [] for name in kinds}
    for step in range(1 + OPTIMIZER_STEPS):
        for name, (shards, adamw) in optimizers.items():
            for shard in shards:
                shard.parameter.grad = torch.randn_like(shard.parameter)
            times[name].append(seconds(lambda adamw=adamw, step=step: adamw.step(1e-5, step)))
    count = sum(shard.whole_shape.numel() for shard in optimizers[kinds[0]][0])
    table = columns(
        f"An optimizer step of {count / 1e6:.1f} million parameters",
        ("states", "masters", "ms/step", "lowest", "highest", "state MiB", "bytes a parameter"),
    )
    for name, (_, adamw) in optimizers.items():
        taken = [1000 * x for x in times[name][1:]]
        num_bytes = sum(state.nbytes for state in adamw.state_tensors().values())
        table.add_row(
            name[0], str(name[1]).removeprefix("torch."),
            *(f"{x:,.0f}" for x in (statistics.median(taken), min(taken), max(taken))),
            f"{num_bytes / 2**20:,.0f}", f"{num_bytes / count:.2f}",
        )  # fmt: skip
    console.print(table)
