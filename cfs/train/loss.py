"""The objective of the paper (below eq. 2), as a sum that is divided once.

min  E_F[-log p(y|x)] + lambda * E_{x ~ p_theta*}[-log p(x)]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cfs.data.mixture import Draw
from cfs.data.packing import MicroBatch
from cfs.model import Decoder
from cfs.model.packed_attention import PackedBatch


@dataclass(frozen=True)
class TargetCounts:
    """Targets of a whole global batch: every micro-batch of every rank."""

    task: int
    synthetic: int

    @classmethod
    def of(cls, draws: list[Draw]) -> TargetCounts:
        counts = {True: 0, False: 0}
        for draw in draws:
            counts[draw.synthetic] += draw.example.num_targets
        return cls(task=counts[False], synthetic=counts[True])


@dataclass(frozen=True)
class SourceWeights:
    """What one target of each source weighs in the batch loss."""

    task: float
    synthetic: float

    @classmethod
    def of(
        cls, counts: TargetCounts, lam: float, normalize: Literal["pooled", "source"]
    ) -> SourceWeights:
        """pooled: 1/N and lam/N with N all targets. source: 1/N_task and lam/N_synthetic.

        Pooled, N_S = r N_F samples make this the paper's objective with weight lam * r, up to
        one scale. Per source, lam is the ratio of the two mean losses whatever their lengths.
        """
        if normalize == "pooled":
            total = max(1, counts.task + counts.synthetic)
            return cls(1.0 / total, lam / total)
        return cls(1.0 / max(1, counts.task), lam / max(1, counts.synthetic))


def token_logprobs(model: Decoder, batch: MicroBatch, grad_hint: Tensor | None = None) -> Tensor:
    """log p_theta(x_t | x_<t) of every target of the batch: (N,) float32, in nats.

    The one thing the objective needs from a model. N counts the True entries of
    `batch.target_mask`, in row-major order; documents see themselves alone, and prompts never
    reach the head.

    grad_hint  (N,) float32, d loss / d log p where it is known before the forward pass; it saves
               a product with the head, and changes no result even if it turns out wrong
    """
    return model(
        batch.input_ids,
        target_mask=batch.target_mask,
        context=document_context(model, batch),
        grad_hint=grad_hint,
    )


def document_context(model: Decoder, batch: MicroBatch) -> PackedBatch | None:
    """What keeps the documents of a packed row apart; None where each has a row of its own."""
    if not batch.lengths:
        return None
    return PackedBatch(batch.lengths, batch.input_ids.device, model.packed_route)


def summed_nll(logprobs: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood summed over task targets and over synthetic targets, in nats.

    logprobs   (N,) float32
    synthetic  (N,) bool

    Returns two float32 scalars; each is zero, not NaN, where it has no targets.
    """
    return (
        -torch.where(synthetic, 0.0, logprobs).sum(),
        -torch.where(synthetic, logprobs, 0.0).sum(),
    )


class BatchLoss(NamedTuple):
    """Float32 scalars. Only `loss` has a gradient; the others are plain sums over targets, in nats,
    whatever the examples' weights."""

    loss: Tensor
    nll_task: Tensor
    nll_synthetic: Tensor
    kl_task: Tensor
    """Of `--method distill`: KL(p_theta* || p_theta) at its temperature, of the task targets."""


class Distillation(Protocol):
    """theta* as a teacher, for `--method distill`."""

    @property
    def strength(self) -> float:
        """What the KL of one target weighs beside its -log p."""
        ...

    def logprobs_and_kl(self, model: Decoder, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """log p_theta of every target, and the KL to theta* at it: (N,) float32 each, in nats."""
        ...


def micro_batch_loss(
    model: Decoder,
    batch: MicroBatch,
    weights: SourceWeights,
    scale: float = 1.0,
    distillation: Distillation | None = None,
) -> BatchLoss:
    """This micro-batch's share of the batch loss times `scale`, and the sums it is made of.

    distillation  adds `strength` times the KL to theta* at each of the task's targets

    Summed over the micro-batches of every rank `loss` is the batch loss: its denominators
    count the whole batch, so nothing is averaged twice. FSDP averages gradients over ranks, and
    `scale` is their number then. To be given to `backward` as it is: the loss is linear in the
    log-probabilities, so the head computes its gradients in the forward pass, and would have to
    do so again for another factor.
    """
    slopes = torch.where(batch.synthetic, -scale * weights.synthetic, -scale * weights.task)
    if batch.weights is not None:
        slopes = slopes * batch.weights
    if distillation is None:
        logprobs = token_logprobs(model, batch, grad_hint=slopes)
        loss, kl = (slopes * logprobs).sum(), logprobs.new_zeros(())
    else:
        logprobs, kls = distillation.logprobs_and_kl(model, batch)
        kls = torch.where(batch.synthetic, 0.0, kls)
        kl = kls.detach().sum()
        weighted = kls if batch.weights is None else kls * batch.weights
        loss = (slopes * logprobs).sum()
        loss = loss + scale * weights.task * distillation.strength * weighted.sum()
    nll_task, nll_synthetic = summed_nll(logprobs.detach(), batch.synthetic)
    return BatchLoss(loss, nll_task, nll_synthetic, kl.detach())
