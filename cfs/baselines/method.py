"""The places in which a method may differ from plain fine-tuning: one class, a function a place.

A baseline is a subclass in a file of its own, beside the formula it implements; `__init__.py` lists
them. It meets parameters and gradients as this rank's rows of them, plain tensors, and adds over
ranks with `Setting.total`; it knows neither FSDP nor the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cfs.errors import UserError


class Shard(Protocol):
    """What this rank holds of one trained parameter: some of its rows, or all of it."""

    @property
    def name(self) -> str: ...

    @property
    def parameter(self) -> nn.Parameter: ...

    @property
    def whole_shape(self) -> torch.Size: ...

    @property
    def rows(self) -> slice:
        """The rows held here, as a range of the whole parameter's first dimension."""
        ...

    @property
    def local(self) -> Tensor:
        """Those rows, sharing the parameter's storage."""
        ...

    @property
    def grad(self) -> Tensor | None:
        """Their gradient, sharing its storage; summed over the batch and all ranks."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a method is given before the first step.

    shards     this rank's rows of every trained parameter
    original   the same rows of theta*, in the checkpoint's dtype; empty unless `needs_original`
    initial    the same rows of the model before the first stage; empty unless `needs_initial`
    tuned      the same rows of each model of `--tuned`; empty unless `needs_tuned`
    total      sum of a tensor over the ranks that hold one copy between them, in place; collective
    num_steps  of the run
    fisher     the rows' diagonal Fisher information, float32; empty unless `num_fisher_samples`
    """

    shards: Sequence[Shard]
    original: list[Tensor]
    initial: list[Tensor]
    tuned: list[list[Tensor]]
    total: Callable[[Tensor], Tensor]
    num_steps: int
    fisher: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """One parameter just after the optimizer's step, as flat views of this rank's rows.

    weights  (N,) as they are now, in the masters' dtype; to be changed in place
    before   (N,) float32, as they were
    read_exp_avg  gives (N,) float32, AdamW's running mean of the gradient, this step's included;
                  8-bit states are decoded for it
    decayed  what decoupled weight decay multiplied `before` by
    """

    number: int
    """Place of the parameter in `Setting.shards`."""
    shard: Shard
    weights: Tensor
    before: Tensor
    read_exp_avg: Callable[[], Tensor]
    decayed: float


@dataclass(frozen=True)
class Mix:
    """Examples that stand beside the task's, `--synthetic-ratio` of them per task example.

    kind         what they are; `train/sources.py` brings them
    what         one of them, in messages
    temperature, top_p   of their sampling; None where nothing is sampled
    """

    kind: str
    what: str
    temperature: float | None = None
    top_p: float | None = None


@dataclass
class Method:
    """Plain fine-tuning. A subclass names itself, declares its options as dataclass fields made by
    `cfs.cli.option`, and overrides the places in which it differs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `--list-methods`."""
    source: ClassVar[str]
    """Where the method comes from."""

    mix: ClassVar[Mix | None] = None
    """Examples mixed in."""
    all_tokens: ClassVar[bool] = False
    """Every token of a task example is a target, as in pretraining (eq. 1)."""
    from_scratch: ClassVar[bool] = False
    """Start from random weights instead of the checkpoint's."""
    needs_original: ClassVar[bool] = False
    """Needs theta* beside the weights, as shards."""
    keeps_original: ClassVar[bool] = True
    """Holds them through the whole run, and not in `begin` alone."""
    needs_initial: ClassVar[bool] = False
    """Likewise the model before the first of several stages."""
    needs_teacher: ClassVar[bool] = False
    """Keep theta* as a frozen model beside the trained one, for a forward pass of its own over
    each micro-batch."""
    needs_tuned: ClassVar[bool] = False
    """Needs models that plain fine-tuning gave: `--tuned`, or a run of the method without it."""
    takes_several: ClassVar[bool] = False
    """May be more than one of them."""
    keeps_tuned: ClassVar[bool] = False
    """Holds the shards of those models through the whole run."""
    keeps: ClassVar[dict[str, int]] = {}
    """Bytes for each trained weight that it holds besides, by what they are (for `--plan`)."""
    merges: ClassVar[bool] = False
    """Trains nothing itself: the result is made of theta* and the models of `--tuned`."""
    alone: ClassVar[str | None] = None
    """Why the method combines with no other, if it does not."""
    claims: ClassVar[dict[str, str]] = {}
    """What only one method of a combination can decide, and how this one does, in words."""
    excludes: ClassVar[dict[str, str]] = {}
    """Methods that it cannot be combined with, and why."""

    @classmethod
    def options(cls) -> list[Any]:
        """The dataclass fields that are flags."""
        return [f for f in fields(cls) if "help" in f.metadata]

    def require(self, option: str, holds: bool, rule: str) -> None:
        """Raise `UserError` about an option's value."""
        if not holds:
            flag = option.replace("_", "-")
            raise UserError(f"--{flag} {getattr(self, option)}: expected {rule}")

    @property
    def num_fisher_samples(self) -> int:
        """Samples of theta* that `Setting.fisher` is to be estimated on; 0 for no need of it."""
        return 0

    @property
    def distillation(self) -> tuple[float, float]:
        """Where `needs_teacher`: what the KL to theta* at one target weighs in the loss beside its
        -log p, and the temperature of the two distributions."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `UserError` where an option's value makes no sense."""

    # ------------------------------------------------------------------ the places, in their order

    weighs_examples: ClassVar[bool] = False
    """Does `example_weights` anything? It costs a forward pass over the task."""

    def example_weights(self, nll_nats: np.ndarray) -> np.ndarray:
        """(num_examples,) what each task example counts in the loss.

        nll_nats  (num_examples,) float64, the mean over each one's targets of -log p_theta*
        """
        return np.ones_like(nll_nats)

    def wrap(self, model: nn.Module) -> None:
        """Change what is trained, before the model is sharded; it may lie on `meta`."""

    def fill(self, shards: Sequence[Shard], seed: int) -> None:
        """Give the parameters that `wrap` added their first values; no checkpoint has them.

        shards  this rank's rows of every parameter, trained or not
        """

    def begin(self, setting: Setting) -> None:
        """Before the first step and on resuming, with the weights in place."""

    def before_step(self, step: int) -> Tensor | None:
        """After the backward pass: change the gradients, in place.

        Returns this rank's share of a penalty, a float64 scalar in nats, to be reported; it must
        be on the shards' device. None where the method has no penalty.
        """
        return None

    def after_update(self, update: Update) -> None:
        """After the update of one parameter; called only where `filters` is set."""

    filters: ClassVar[bool] = False
    """Does `after_update` anything? It costs a copy of one parameter at a time."""

    def after_step(self, step: int) -> None:
        """After the optimizer's step `step`, counted from 0."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method; JSON-able and alike on all ranks."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""

    def result(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of the model to be written, by the names that the base has, in its order.

        named  all parameters of the model that was trained, whole, one after the other
        """
        yield from named

    def write_more(self, named: Iterable[tuple[str, Tensor]], out: Path, base: str) -> None:
        """Write into the run directory what the method leaves besides; called on rank 0 alone,
        only where `leaves_more` is set, with `named` as in `result`.

        base  directory or hub name of theta*
        """

    leaves_more: ClassVar[bool] = False

    def variants(self) -> list[str]:
        """Where `merges`: the name of each model that is made, such as "alpha-0.5"."""
        return []

    def merged(self, variant: int, original: Tensor, tuned: list[Tensor]) -> Tensor:
        """One parameter of the model that variant number `variant` is.

        original, tuned  whole and float32, of theta* and of each model of `--tuned`
        """
        raise NotImplementedError


def zero_like_grads(shards: Iterable[Shard]) -> None:
    """Give every shard a gradient, of zeros where the batch gave none."""
    for shard in shards:
        if shard.parameter.grad is None:
            shard.parameter.grad = torch.zeros_like(shard.parameter)


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Flat chunks of equally many elements of each: temporaries near a CPU's cache, or kernels
    that are worth their launch."""
    chunk = 2**20 if tensors[0].device.type == "cpu" else 2**23
    return zip(*(tensor.view(-1).split(chunk) for tensor in tensors), strict=True)
