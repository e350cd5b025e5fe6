"""theta* as a model of its own, frozen and sharded like the trained one: what distillation needs.

Over all ranks it takes one copy of the checkpoint, and a gathered block while it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cfs.data.packing import MicroBatch
from cfs.model import Decoder, build_model
from cfs.model.kl_head import logprobs_and_kl
from cfs.model.logprobs import rows_of_chunk
from cfs.model.weights import open_weights
from cfs.ranks import Ranks
from cfs.train.loss import document_context
from cfs.train.parallel import LocalShard, shard


@dataclass(frozen=True)
class Teacher:
    """What `micro_batch_loss` needs of `--method distill`.

    strength  of the KL of one target, in the loss
    """

    original: Decoder
    strength: float
    temperature: float

    def logprobs_and_kl(self, model: Decoder, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """`distilled` with this teacher."""
        return distilled(model, self.original, batch, self.temperature)


def frozen_original(
    directory: Path,
    ranks: Ranks,
    compute_dtype: torch.dtype,
    ranks_per_copy: int | None = None,
) -> Decoder:
    """theta* of a checkpoint, of which each rank reads and holds its own rows alone.

    The parameters have the checkpoint's dtype and no gradients; they are computed with in
    `compute_dtype`. ranks_per_copy as in `shard`. Raises `UserError` as `open_weights` does.
    """
    stored = open_weights(directory)
    model = build_model(stored.config, device="meta").to(stored.dtype).requires_grad_(False)
    shard(model, ranks, compute_dtype, ranks_per_copy)
    if isinstance(model, FSDPModule):
        # A root stays gathered after its forward pass, for a backward pass that never comes here:
        # embedding and head would lie whole on every rank for the rest of the run.
        model.set_reshard_after_forward(True)
    model.to_empty(device=ranks.device)
    for name, parameter in model.named_parameters():
        piece = LocalShard(name, parameter)
        piece.local.copy_(stored.read(name, piece.rows))
    return model


def distilled(
    model: Decoder, teacher: Decoder, batch: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p_theta and KL(p_theta* || p_theta) at every target of the batch, (N,) float32 nats.

    N counts the True entries of `batch.target_mask`, in row-major order, as in `token_logprobs`;
    synthetic targets are among them. The KL compares the distributions of `temperature`; log p is
    that of temperature 1. Gradients go to `model` alone. Collective: two forward passes.
    """
    packed = document_context(model, batch)

    def original_head(hidden: Tensor, weight: Tensor, _targets: Tensor) -> tuple[Tensor, Tensor]:
        # The student's backward pass reads it, long after FSDP has freed what it gathered.
        return hidden, weight.clone() if isinstance(teacher, FSDPModule) else weight

    with torch.no_grad():
        theirs = teacher(batch.input_ids, batch.target_mask, packed, head=original_head)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # Either model's logits and softmax: four (rows, V) tensors at a time instead of one.
        rows = max(1, rows_of_chunk(weight) // 4)
        return logprobs_and_kl(hidden, weight, targets, *theirs, temperature=temperature, rows=rows)

    return model(batch.input_ids, batch.target_mask, packed, head=head)
