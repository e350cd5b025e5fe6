"""FSDP2, applied to a model from outside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cfs.model import Decoder
from cfs.ranks import Ranks


def shard(model: Decoder, ranks: Ranks, compute_dtype: torch.dtype) -> None:
    """`fully_shard` every block and the root, in place; compute in `compute_dtype`.

    A lone process that computes in its masters' dtype has nothing to shard or cast, and keeps the
    model as it is. Gradients are averaged over ranks, in float32.
    """
    masters = next(model.parameters()).dtype
    if ranks.world_size == 1 and compute_dtype == masters:
        return
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented)
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    # Inputs are not cast: the rotary phases must stay float32, and ids are integers.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def full_parameters(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, one after the other. A collective: all ranks must exhaust it."""
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass leaves the root's parameters gathered, in compute dtype
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
