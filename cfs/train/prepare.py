"""All that a run needs, put together, and set back to where its newest checkpoint left it."""

from __future__ import annotations

from pathlib import Path

from cfs.data.mixture import Mixture, Source
from cfs.errors import UserError
from cfs.ranks import Ranks
from cfs.train.checkpoint import Checkpoints, latest, load, read_facts, verify
from cfs.train.config import TrainConfig
from cfs.train.endpoints import starting_model
from cfs.train.kl import HeldOutSamples
from cfs.train.loop import Progress, Run
from cfs.train.metrics import MetricsLog
from cfs.train.optim import ShardedAdamW
from cfs.train.reference import Reference
from cfs.train.rundir import CHECKPOINTS, METRICS


def prepared_run(
    config: TrainConfig,
    directory: Path,
    sources: list[Source],
    held_out: HeldOutSamples | None,
    out: Path,
    ranks: Ranks,
) -> Run:
    """The run in `out`, at its beginning or where it was interrupted. Collective.

    directory  the checkpoint it starts from
    """
    trained = starting_model(config, directory, ranks)
    shards = trained.shards
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
        Reference(shards, trained.stored, config.offload_reference) if config.l2 > 0 else None,
        checkpoints=Checkpoints(out / CHECKPOINTS, ranks, config.keep),
        result_dtype=trained.result_dtype,
    )
    resume(run, out / CHECKPOINTS)

    def open_log() -> None:
        run.metrics = MetricsLog(out, out / METRICS, config, run.progress.step)

    ranks.on_main(open_log)
    return run


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
    run.progress = Progress.from_facts(facts["progress"])
