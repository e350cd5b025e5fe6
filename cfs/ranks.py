"""The processes of a run: one alone, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cfs.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; a lone process is rank 0 of 1, and nothing here costs it."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` gives on rank 0, on every rank; its `UserError` is every rank's too."""
        if self.world_size == 1:
            return function()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


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
    return Ranks(dist.get_rank() if world_size > 1 else 0, world_size, target)


def finish() -> None:
    """Leave the group of ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
