"""theta* beside the trained model: this rank's rows alone, in the checkpoint's own dtype.

A penalty on the distance to theta* needs no second model: each rank holds the same rows of theta*
that it trains, adds the penalty's gradient to its gradient shards after the backward pass, and
nothing is gathered. Over all ranks theta* takes one copy of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfs.model.weights import StoredWeights
from cfs.train.parallel import LocalShard

CHUNK_ON_CPU, CHUNK_ON_DEVICE = 2**20, 2**23
"""Elements at a time: a float32 difference near a CPU's cache, or kernels worth their launch."""


class Reference:
    """The rows of theta* that belong to each shard.

    on_host  keep them in host memory (pinned beside CUDA) and bring them over piece by piece
    """

    def __init__(self, shards: list[LocalShard], stored: StoredWeights, on_host: bool) -> None:
        self.shards = shards
        self.values: list[Tensor] = []
        for shard in shards:
            masters = shard.local.dtype
            # A master narrower than the checkpoint starts at the rounded value, so that is theta*.
            value = stored.read(shard.name, shard.rows).to(masters)
            if stored.dtype.itemsize < masters.itemsize:
                value = value.to(stored.dtype)
            is_cuda = shard.local.device.type == "cuda"
            if on_host:
                self.values.append(value.pin_memory() if is_cuda else value)
            else:
                self.values.append(value.to(shard.local.device))

    @property
    def num_bytes(self) -> int:
        """Of theta* on this rank."""
        return sum(value.nbytes for value in self.values)

    @torch.no_grad()
    def add_l2(self, strength: float) -> Tensor:
        """Add the gradient of strength * ||theta - theta*||^2 to the gradient shards.

        Returns this rank's share of ||theta - theta*||^2, a float64 scalar on the device; the sum
        over the ranks that hold one copy is the whole.
        Source: the l2 baseline of section 3 and Table 10 (Kumar et al. 2023, L2 init).
        """
        total = torch.zeros((), dtype=torch.float64, device=self.shards[0].local.device)
        for shard, value in zip(self.shards, self.values, strict=True):
            if shard.parameter.grad is None:
                shard.parameter.grad = torch.zeros_like(shard.parameter)
            assert shard.grad is not None
            chunk = CHUNK_ON_CPU if shard.grad.device.type == "cpu" else CHUNK_ON_DEVICE
            flat = (x.view(-1) for x in (shard.local, shard.grad, value))
            pieces = (x.split(chunk) for x in flat)
            for here, grad, there in zip(*pieces, strict=True):
                moved = here.float() - there.to(here.device, non_blocking=True).float()
                grad.add_(moved, alpha=2.0 * strength)
                total += torch.dot(moved, moved)
        return total
