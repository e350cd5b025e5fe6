"""The one training loop. With `loss.py` it is all that a step consists of."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch

from cfs.baselines import Method
from cfs.data.mixture import Draw, Mixture
from cfs.data.packing import micro_batches
from cfs.errors import MainRankError, NonFiniteError
from cfs.model import Decoder
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.train.checkpoint import Checkpoints
from cfs.train.config import TrainConfig
from cfs.train.kl import HeldOutSamples, KLEstimate, estimate_kl, sequence_logprobs
from cfs.train.loss import Distillation, SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.metrics import MetricsLog, clocked_metrics
from cfs.train.optim import ShardedAdamW, cosine_lr
from cfs.train.parallel import LocalShard
from cfs.train.stopping import StopRequest, listening


@dataclass
class Progress:
    """Where a run stands; a checkpoint keeps it beside the weights."""

    step: int = 0
    """Steps taken."""
    targets_task: int = 0
    targets_synthetic: int = 0
    seconds: float = 0.0
    kl: KLEstimate | None = None
    """The last estimate; None where no held-out samples were given."""

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Progress:
        values: dict[str, Any] = facts | {"kl": facts["kl"] and KLEstimate(**facts["kl"])}
        return cls(**values)


@dataclass
class Run:
    """All that a step touches.

    model      on `ranks.device`, sharded or whole; trained in place
    shards     this rank's part of its parameters
    held_out   samples of theta* for the KL, estimated before the first step, every
               `config.kl_every` steps and after the last
    methods    what differs from plain fine-tuning; they have begun
    distillation  theta* as a teacher, where a method needs it
    metrics, checkpoints   None: nothing is written
    result_dtype  of the model that the run writes in the end
    """

    config: TrainConfig
    ranks: Ranks
    model: Decoder
    shards: list[LocalShard]
    optimizer: ShardedAdamW
    mixture: Mixture
    held_out: HeldOutSamples | None = None
    methods: list[Method] = field(default_factory=list)
    distillation: Distillation | None = None
    metrics: MetricsLog | None = None
    checkpoints: Checkpoints | None = None
    progress: Progress = field(default_factory=Progress)
    result_dtype: torch.dtype = torch.float32


def train(run: Run) -> bool:
    """Minimise the objective from `run.progress.step` to `config.steps`; False if stopped before.

    SIGTERM, SIGUSR1 and `config.stop_after` stop it after a step, with a checkpoint of it. Raises
    `NonFiniteError`, with a checkpoint of the step before, on a loss or gradient that is no
    finite number.
    """
    config, progress = run.config, run.progress
    if progress.step == 0:
        if run.held_out is not None:
            progress.kl = estimate_kl(run.model, run.held_out, config.micro_batch_tokens, run.ranks)
            _log(run, {"step": 0} | _named_kl(progress.kl))
        save_checkpoint(run)
    with (
        listening() as request,
        _finished(run.checkpoints),
        Bar("train", config.steps, enabled=run.ranks.is_main, first=progress.step) as bar,
    ):
        while progress.step < config.steps:
            started = time.monotonic()
            metrics, is_asked_to_stop = take_step(run, progress.step, request)
            progress.step += 1
            progress.seconds += time.monotonic() - started
            is_last = progress.step == config.steps
            is_stopped = is_asked_to_stop or progress.step >= (config.stop_after or math.inf)
            if run.held_out is not None and (is_last or progress.step % config.kl_every == 0):
                progress.kl = estimate_kl(
                    run.model, run.held_out, config.micro_batch_tokens, run.ranks
                )
                metrics |= _named_kl(progress.kl)
            _log(run, metrics)
            if is_last or is_stopped or progress.step % config.save_every == 0:
                check_weights(run)
                save_checkpoint(run)
            bar.advance(1, f"loss {metrics['loss']:.3f}" + _kl_note(progress.kl))
            if is_stopped and not is_last:
                request.is_granted = True
                return False
    return True


def take_step(run: Run, step: int, request: StopRequest) -> tuple[dict[str, Any], bool]:
    """One gradient step, counted from 0: its metrics, and whether any rank was asked to stop."""
    config, ranks = run.config, run.ranks
    started = time.monotonic()
    draws = run.mixture.batch(step)
    counts = TargetCounts.of(draws)
    weights = SourceWeights.of(counts, config.lam, config.normalize)
    sums = torch.zeros(7, dtype=torch.float64, device=ranks.device)
    for batch in micro_batches(draws, config.micro_batch_tokens, ranks.rank, ranks.world_size):
        # FSDP averages gradients over ranks; the loss is a sum over them.
        terms = micro_batch_loss(
            run.model, batch.to(ranks.device), weights, ranks.world_size, run.distillation
        )
        terms.loss.backward()
        sums[:4] += torch.stack([term.detach() for term in terms])

    # Ranks hold `copies` equal copies of the model's shards; what is summed over shards counts
    # each of them.
    copies = ranks.world_size // run.shards[0].num_shards
    penalties = {method.name: method.before_step(step) for method in run.methods}
    penalties = {name: value / copies for name, value in penalties.items() if value is not None}
    sums[4] = squared_grad_norm(run.shards) / copies
    sums[5], sums[6] = request.is_made, run.checkpoints is not None and run.checkpoints.failed
    sums = ranks.sum(torch.cat((sums, *(value.view(1) for value in penalties.values()))))
    loss, nll_task, nll_synthetic, kl_task, squared_norm, wishes, failures, *added = sums.tolist()
    if failures and run.checkpoints is not None:
        run.checkpoints.finish()  # raises on every rank what one of them met

    grad_norm = math.sqrt(squared_norm)
    loss = loss / ranks.world_size + sum(added)
    if not math.isfinite(loss + grad_norm):
        refuse_step(run, draws, loss, grad_norm)
    lr = cosine_lr(step, config.steps, config.lr, config.warmup)
    too_long = config.clip > 0 and grad_norm > config.clip
    run.optimizer.step(
        lr,
        step,
        scale=config.clip / grad_norm if too_long else 1.0,
        after_update=[method.after_update for method in run.methods if method.filters],
    )
    for method in run.methods:
        method.after_step(step)

    run.progress.targets_task += counts.task
    run.progress.targets_synthetic += counts.synthetic
    metrics = {
        "step": step + 1,
        "loss": loss,
        "nll_task": nll_task / counts.task if counts.task else None,
        "nll_synthetic": nll_synthetic / counts.synthetic if counts.synthetic else None,
        "targets_task": counts.task,
        "targets_synthetic": counts.synthetic,
        "grad_norm": grad_norm,
        "lr": lr,
    }
    metrics |= {f"{name}_penalty": value for name, value in zip(penalties, added, strict=True)}
    if run.distillation is not None:
        metrics["kl_task"] = kl_task / counts.task if counts.task else None
    seconds = time.monotonic() - started
    metrics |= clocked_metrics(run.model, draws, seconds, ranks)
    return metrics, wishes > 0


def squared_grad_norm(shards: list[LocalShard]) -> torch.Tensor:
    """Sum of the squares of this rank's gradients, a float64 scalar on their device."""
    norms = [
        torch.linalg.vector_norm(shard.grad, dtype=torch.float32)
        for shard in shards
        if shard.grad is not None
    ]
    if not norms:  # a method has taken the gradients for its own
        return torch.zeros((), dtype=torch.float64, device=shards[0].local.device)
    return torch.stack(norms).double().square().sum()


def refuse_step(run: Run, draws: list[Draw], loss: float, grad_norm: float) -> None:
    """Save the state before the step, and raise `NonFiniteError` with the examples' names.

    Weights that are not finite themselves are not saved: the checkpoints before them stand.
    """
    for shard in run.shards:
        shard.parameter.grad = None
    check_weights(run)
    save_checkpoint(run, wait=True)
    ids, logprobs = sequence_logprobs(
        run.model, [d.example for d in draws], run.config.micro_batch_tokens, run.ranks
    )
    own = [i for i, value in zip(ids, logprobs, strict=True) if not math.isfinite(value)]
    culprits = sorted(i for part in run.ranks.gather(own) for i in part)
    blamed = ", ".join(draws[i].id for i in culprits) or "none of them alone"
    message = (
        f"step {run.progress.step + 1}: loss {loss}, gradient norm {grad_norm}; the step was not "
        f"taken. Its examples: {', '.join(draw.id for draw in draws)}. Not finite by itself: "
        f"{blamed}. Remove what is wrong with them, or begin again in another --out with a lower "
        "--lr or in --dtype float32"
    )
    stop_all(run, message)


def check_weights(run: Run) -> None:
    """Raise `NonFiniteError` rather than save weights that are not finite. Collective."""
    if not weights_are_finite(run):
        stop_all(
            run,
            f"step {run.progress.step}: the weights are not finite after it; the checkpoints "
            "before it stand. Begin again in another --out with a lower --lr or with --clip",
        )


def weights_are_finite(run: Run) -> bool:
    """Are all weights of all ranks finite numbers? Collective."""
    bad = [(~shard.local.isfinite()).any() for shard in run.shards]
    return not bool(run.ranks.sum(torch.stack(bad).sum()))


def stop_all(run: Run, message: str) -> NoReturn:
    """Raise `NonFiniteError` on every rank; rank 0 alone says why."""
    if run.ranks.is_main:
        raise NonFiniteError(message)
    raise MainRankError(message, NonFiniteError.exit_code)


def save_checkpoint(run: Run, wait: bool = False) -> None:
    """Write the state after `run.progress.step` steps in the background. Collective."""
    if run.checkpoints is None:
        return
    tensors = {f"model.{shard.name}": shard.like(shard.local) for shard in run.shards}
    facts = {
        "progress": asdict(run.progress),
        "optimizer": run.optimizer.state_facts(),
        "methods": {method.name: method.state() for method in run.methods},
        "batches": run.mixture.fingerprint,
    }
    run.checkpoints.save(
        run.progress.step, tensors | run.optimizer.state_tensors(), facts, wait=wait
    )


@contextmanager
def _finished(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Wait at the end of the block for the checkpoint that is being written, failure or not."""
    try:
        yield
    finally:
        if checkpoints is not None:
            checkpoints.finish()


def _named_kl(kl: KLEstimate) -> dict[str, float]:
    return {"kl_nats": kl.nats, "kl_se": kl.se}


def _kl_note(kl: KLEstimate | None) -> str:
    return "" if kl is None else f"  KL(base || model) {kl.nats:.2f} ± {kl.se:.2f} nats"


def _log(run: Run, metrics: dict[str, Any]) -> None:
    if run.metrics is not None:
        run.metrics.write(metrics)
