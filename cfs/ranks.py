"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cfs.errors import MainRankError, UserError

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long ranks wait for what hosts do: files, and shares of a corpus that end hours apart."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; a lone process is rank 0 of 1, and nothing here costs it."""

    rank: int
    world_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None
    """The same ranks over gloo with `PATIENCE`, for all but the devices' own arithmetic."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` gives on rank 0, on every rank; its `UserError` stops every rank."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except UserError as error:
                outcome = [error]
        with _alive():
            dist.broadcast_object_list(outcome, src=0, group=self.hosts)
        if isinstance(outcome[0], UserError):
            error = outcome[0]
            raise error if self.is_main else MainRankError(str(error), error.exit_code)
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with _alive():
                dist.all_gather_object(values, value, group=self.hosts)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            with _alive():
                dist.barrier(self.hosts)


@contextmanager
def _alive() -> Iterator[None]:
    """A `UserError` where another rank has ended, which has its own message to say why."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("closed by peer", "reset by peer", "Broken pipe")):
            raise UserError("another rank ended; its message says why") from error
        raise


def start(device: str) -> Ranks:
    """Join the ranks that torchrun started, if it did, and choose this rank's device.

    device  "cpu", "cuda" or "auto", which is CUDA where torch sees one
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(target)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if world_size == 1:
        return Ranks(0, 1, target)
    hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(hosts, dist.ProcessGroup), "every rank is in the group of all"
    return Ranks(dist.get_rank(), world_size, target, hosts)


def finish() -> None:
    """Leave the group of ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
