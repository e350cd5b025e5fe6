"""All that a run needs, put together, and set back to where its newest checkpoint left it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cfs.baselines import Method, Setting
from cfs.data.formats import Example
from cfs.data.mixture import Mixture, Source
from cfs.errors import UserError
from cfs.model import build_model, read_config, resolve_checkpoint
from cfs.ranks import Ranks
from cfs.train.checkpoint import Checkpoints, latest, load, read_facts, verify
from cfs.train.config import TrainConfig
from cfs.train.endpoints import Trained, starting_model
from cfs.train.fisher import fisher_information
from cfs.train.kl import HeldOutSamples
from cfs.train.loop import Progress, Run
from cfs.train.manifest import on_all
from cfs.train.metrics import MetricsLog
from cfs.train.optim import ShardedAdamW
from cfs.train.parallel import wrapped
from cfs.train.reference import check_shape, rows_of, stored_rows
from cfs.train.rundir import CHECKPOINTS, METRICS, MODEL
from cfs.train.teacher import Teacher, frozen_original


def prepared_run(
    config: TrainConfig,
    directory: Path,
    sources: list[Source],
    held_out: HeldOutSamples | None,
    out: Path,
    ranks: Ranks,
    fisher_samples: list[Example] | None = None,
) -> Run:
    """The run in `out`, at its beginning or where it was interrupted. Collective.

    directory       the checkpoint it starts from
    fisher_samples  of theta*, where a method needs its Fisher information
    """
    methods = config.methods
    trained = starting_model(config, directory, ranks, methods)
    shards = trained.shards
    setting = _setting(config, methods, trained, fisher_samples, ranks)
    optimizer = ShardedAdamW(
        shards, config.optimizer, config.weight_decay, config.beta2, config.seed
    )
    run = Run(
        config,
        ranks,
        trained.model,
        shards,
        optimizer,
        Mixture(sources, config.batch_size, config.seed),
        held_out,
        methods,
        _teacher(config, methods, directory, ranks),
        checkpoints=Checkpoints(out / CHECKPOINTS, ranks, config.keep),
        result_dtype=trained.result_dtype,
    )
    resume(run, out / CHECKPOINTS)

    def begin() -> None:
        for method in methods:
            method.begin(setting)

    on_all(begin, ranks)

    def open_log() -> None:
        run.metrics = MetricsLog(out, out / METRICS, config, run.progress.step)

    ranks.on_main(open_log)
    return run


def check_models(config: TrainConfig, directory: Path) -> None:
    """Raise `UserError` for options that the model in `directory` does not allow, and for other
    models that do not have its shape: before any work, and without reading weights."""
    model_config = read_config(directory)
    wrapped(build_model(model_config, device="meta"), config.methods)
    initial = config.method_option("init_model")
    named = {"--tuned": config.tuned or [], "--init-model": [initial] if initial else []}
    for flag, names in named.items():
        for name in names:
            try:
                path = resolve_checkpoint(name, weights=False)
                check_shape(path, flag, directory)
            except UserError as error:
                inside = Path(name) / MODEL
                hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
                named = "" if str(error).startswith(flag) else f"{flag} {name}: "
                raise UserError(f"{named}{error}{hint}") from error


def _teacher(
    config: TrainConfig, methods: list[Method], directory: Path, ranks: Ranks
) -> Teacher | None:
    """theta* as a second model, for the method that distils from it. Collective."""
    for method in methods:
        if method.needs_teacher:
            compute = getattr(torch, config.dtype)
            original = frozen_original(directory, ranks, compute, config.shard_ranks)
            return Teacher(original, *method.distillation)
    return None


def _setting(
    config: TrainConfig,
    methods: list[Method],
    trained: Trained,
    fisher_samples: list[Example] | None,
    ranks: Ranks,
) -> Setting:
    """What the methods need of other models, this rank's rows of it. Collective."""
    shards, stored, on_host = trained.shards, trained.stored, config.offload_reference
    original, initial, tuned, fisher = [], [], [], []
    if any(method.needs_original for method in methods):
        original = stored_rows(shards, stored, on_host)
    for method in methods:
        if method.needs_initial:
            initial = rows_of(
                config.method_option("init_model") or str(stored.directory),
                "--init-model",
                shards,
                stored,
                on_host,
            )
    if any(method.needs_tuned and not method.merges for method in methods):
        assert config.tuned is not None, "train.py trains one where none is given"
        tuned = [rows_of(name, "--tuned", shards, stored, on_host) for name in config.tuned]
    if any(method.num_fisher_samples for method in methods):
        assert fisher_samples is not None, "samples come with the method that asks for them"
        fisher = fisher_information(trained.model, shards, fisher_samples, config, ranks)
    total = partial(_total, ranks, ranks.world_size // shards[0].num_shards)
    assert config.steps is not None
    return Setting(shards, original, initial, tuned, total, config.steps, fisher)


def _total(ranks: Ranks, copies: int, values: Tensor) -> Tensor:
    """Sum over the ranks that hold one of `copies` equal copies of the model, in place."""
    ranks.sum(values)
    return values.div_(copies, rounding_mode=None if values.is_floating_point() else "floor")


def resume(run: Run, checkpoints: Path) -> None:
    """Load the newest checkpoint, if there is one, whatever ranks it was saved on.

    Collective. Raises `UserError` where the checkpoint is damaged, naming the one before it, and
    where the run would not meet the same examples again.
    """
    path = run.ranks.on_main(lambda: latest(checkpoints))
    if path is None:
        return
    verify(path, run.ranks)
    facts = read_facts(path)
    if facts["batches"] != run.mixture.fingerprint:
        raise UserError(
            f"{path}: the run began with other examples than --data and --synthetic give now; "
            "bring the files back as they were, or choose another --out"
        )
    load(path, {f"model.{s.name}": s.like(s.local) for s in run.shards}, run.ranks)
    run.optimizer.load_state(facts["optimizer"], lambda tensors: load(path, tensors, run.ranks))
    for method in run.methods:
        method.set_state(facts["methods"][method.name])
    run.progress = Progress.from_facts(facts["progress"])
