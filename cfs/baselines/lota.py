"""LoTA: train only the entries that a first fine-tuning moved furthest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cfs.baselines.largest import kth_largest
from cfs.baselines.method import Method, Setting, Shard, Update, pieces
from cfs.cli import option
from cfs.errors import UserError


@dataclass
class Lota(Method):
    """Lottery ticket adaptation, by the three phases of its paper: a model is fine-tuned
    (`--tuned`); the entries that this moved furthest are the mask; training starts again from
    theta* and moves those alone.

    One threshold on |theta_tuned - theta*| serves all attention and MLP matrices together; entries
    that tie with it all train. Everything else stays as it is, bit for bit: the other entries of
    those matrices, embeddings, head and norms.

    Source: Panda et al. 2024, and the authors' code: `save_mask.py` for the mask, with
    `only_update_prune=True` as its script calls it (by default other parameters train as well),
    and `trainers.py`, which zeroes gradients before it clips them. They train with RMSprop, which
    leaves an entry without gradient alone; AdamW decays it, which is undone here. Their masks for
    a sequence of tasks, each avoiding those before it, are not here.
    """

    name = "lota"
    summary = "trains only the attention and MLP entries that a first fine-tuning moved furthest"
    source = "Panda et al. 2024, arXiv 2406.16797"
    needs_original = True
    needs_tuned = True
    keeps_original = False
    keeps: ClassVar[dict[str, int]] = {"mask": 1}
    claims: ClassVar[dict[str, str]] = {"the update": "moves only the entries of its mask"}
    filters = True

    lota_sparsity: float = option(0.9, "share of the attention and MLP entries that stays frozen")

    def check(self) -> None:
        self.require("lota_sparsity", 0.0 <= self.lota_sparsity < 1.0, "in [0, 1)")

    def begin(self, setting: Setting) -> None:
        """Draw the mask, `frozen`: of each shard a bool for each of its rows' elements, True where
        frozen, or None where all of it is. Collective.

        The differences are made three times, in pieces, and never held. Raises `UserError` where
        fewer entries differ from theta* than are to train, and where no matrix trains.
        """
        if len(setting.tuned) != 1:
            raise UserError(
                f"--tuned: lota draws its mask from one fine-tuned model, got {len(setting.tuned)}"
            )
        models = zip(setting.shards, setting.original, setting.tuned[0], strict=True)
        changes = [_Change(*rows) for rows in models]
        matrices = _Changes([change for change in changes if change.is_eligible])
        if not matrices.parts:
            raise UserError(
                "--method: lota trains attention and MLP matrices, and all of them are frozen; "
                "name other parts in --freeze, or leave one of the two methods out"
            )
        num_entries = sum(change.shard.whole_shape.numel() for change in matrices.parts)
        num_trained = max(1, round((1.0 - self.lota_sparsity) * num_entries))
        threshold = kth_largest([matrices], [num_trained], setting.total)
        if float(threshold) == 0.0:
            moved = torch.stack([piece.count_nonzero() for piece in matrices]).sum()
            self._check_moved(int(setting.total(moved)), num_entries)
        self.shards = setting.shards
        self.frozen = [c.below(threshold) if c.is_eligible else None for c in changes]

    def _check_moved(self, num_moved: int, num_entries: int) -> None:
        """Raise `UserError` where a threshold of 0 would train more than was asked for."""
        if num_moved == 0:
            raise UserError(
                "--tuned: its attention and MLP weights all equal those of --model, so that no "
                "mask can be drawn; give a model that was fine-tuned from --model"
            )
        if self.lota_sparsity > 0.0:
            raise UserError(
                f"--lota-sparsity {self.lota_sparsity}: of {num_entries} attention and MLP entries "
                f"it would train more than the {num_moved} that differ between --tuned and "
                "--model; raise it, or give a model that was fine-tuned for longer or saved with "
                "--result-dtype float32"
            )

    def before_step(self, step: int) -> None:
        """Take the gradients of frozen entries away, so that the norm that is clipped counts only
        what trains, and so that they leave no momentum."""
        for shard, frozen in zip(self.shards, self.frozen, strict=True):
            if frozen is None:
                shard.parameter.grad = None
            elif shard.grad is not None:
                shard.grad.masked_fill_(frozen, 0.0)

    def after_update(self, update: Update) -> None:
        """Undo the weight decay of frozen entries, and what another method's gradient did."""
        frozen = self.frozen[update.number]
        if frozen is None:
            update.weights.copy_(update.before)
            return
        for weights, before, stays in pieces(update.weights, update.before, frozen):
            weights.copy_(torch.where(stays, before.to(weights.dtype), weights))


@dataclass(frozen=True)
class _Change:
    """theta_tuned - theta* of one shard's rows, made anew at each iteration.

    It gives flat float32 pieces on the shard's device; the models' rows may lie on the host.
    """

    shard: Shard
    original: Tensor
    tuned: Tensor

    @property
    def is_eligible(self) -> bool:
        """Is it of a matrix of the attention or the MLP?"""
        name = self.shard.name
        return len(self.shard.whole_shape) >= 2 and (".self_attn." in name or ".mlp." in name)

    def __iter__(self) -> Iterator[Tensor]:
        device = self.shard.local.device
        for start, end in pieces(self.original, self.tuned):
            yield end.to(device, torch.float32) - start.to(device, torch.float32)

    def below(self, threshold: Tensor) -> Tensor:
        """Where its magnitude is below the threshold: bool, shaped as the rows."""
        return torch.cat([piece.abs() < threshold for piece in self]).view_as(self.shard.local)


@dataclass(frozen=True)
class _Changes:
    """The pieces of several changes, one after the other, made anew at each iteration."""

    parts: list[_Change]

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from part
