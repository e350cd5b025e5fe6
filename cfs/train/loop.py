"""The one training loop. With `loss.py` it is all that a step consists of."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cfs.data.mixture import Mixture
from cfs.data.packing import micro_batches
from cfs.errors import UserError
from cfs.model import Decoder
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.kl import HeldOutSamples, KLEstimate, estimate_kl
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.optim import cosine_lr, make_adamw


@dataclass(frozen=True)
class TrainResult:
    """What a run amounts to; `kl` is None where no held-out samples were given."""

    steps: int
    targets_task: int
    targets_synthetic: int
    train_seconds: float
    kl: KLEstimate | None


def train(
    model: Decoder,
    mixture: Mixture,
    held_out: HeldOutSamples | None,
    config: TrainConfig,
    ranks: Ranks,
    metrics_file: Path,
) -> TrainResult:
    """Minimise the objective for `config.steps` steps, writing a line of metrics for each.

    model     sharded or whole, on `ranks.device`, float32 masters; trained in place
    held_out  samples of the starting model for the KL, estimated before the first step, every
              `config.kl_every` steps and after the last
    """
    optimizer = make_adamw(model, config.lr, config.weight_decay, config.beta2)
    targets = TargetCounts(task=0, synthetic=0)
    started = time.monotonic()
    kl = None
    if held_out is not None:
        kl = estimate_kl(model, held_out, config.micro_batch_tokens, ranks)
        _log(metrics_file, ranks, {"step": 0, "kl_nats": kl.nats, "kl_se": kl.se})

    with Bar("train", config.steps, enabled=ranks.is_main) as bar:
        for step in range(config.steps):
            step_started = time.monotonic()
            draws = mixture.batch(step)
            counts = TargetCounts.of(draws)
            weights = SourceWeights.of(counts, config.lam, config.normalize)
            sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            for batch in micro_batches(
                draws, config.micro_batch_tokens, ranks.rank, ranks.world_size
            ):
                loss, nll_task, nll_synthetic = micro_batch_loss(
                    model, batch.to(ranks.device), weights
                )
                # FSDP averages gradients over ranks; the loss is a sum over them.
                (loss * ranks.world_size).backward()
                sums += torch.stack((nll_task, nll_synthetic))

            grad_norm = clip_gradients(model, config.clip)
            if not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step + 1}: the gradient's norm is {grad_norm}; the step was not taken; "
                    "lower --lr, or compute in --dtype float32"
                )
            lr = cosine_lr(step, config.steps, config.lr, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            nll_task, nll_synthetic = ranks.sum(sums).tolist()
            targets = TargetCounts(targets.task + counts.task, targets.synthetic + counts.synthetic)
            metrics = {
                "step": step + 1,
                "loss": weights.task * nll_task + weights.synthetic * nll_synthetic,
                "nll_task": nll_task / counts.task if counts.task else None,
                "nll_synthetic": nll_synthetic / counts.synthetic if counts.synthetic else None,
                "targets_task": counts.task,
                "targets_synthetic": counts.synthetic,
                "grad_norm": grad_norm,
                "lr": lr,
                "tokens_per_s": sum(len(d.example.input_ids) for d in draws)
                / (time.monotonic() - step_started),
            }
            is_last = step + 1 == config.steps
            if held_out is not None and (is_last or (step + 1) % config.kl_every == 0):
                kl = estimate_kl(model, held_out, config.micro_batch_tokens, ranks)
                metrics |= {"kl_nats": kl.nats, "kl_se": kl.se}
            _log(metrics_file, ranks, metrics)
            bar.advance(1, f"loss {metrics['loss']:.3f}" + _kl_note(kl))
    return TrainResult(
        config.steps, targets.task, targets.synthetic, time.monotonic() - started, kl
    )


def clip_gradients(model: Decoder, largest: float) -> float:
    """Scale all gradients so that their joint norm is at most `largest`; the norm before.

    Collective under FSDP; 0 scales nothing. The result is on the host.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def _kl_note(kl: KLEstimate | None) -> str:
    return "" if kl is None else f"  KL(base || model) {kl.nats:.2f} ± {kl.se:.2f} nats"


def _log(file: Path, ranks: Ranks, metrics: dict[str, float | int | None]) -> None:
    if ranks.is_main:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics) + "\n")
