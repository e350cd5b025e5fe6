"""FSDP2, activation checkpointing and compilation, applied to a model from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cfs.baselines import Method
from cfs.errors import UserError
from cfs.model import Decoder
from cfs.ranks import Ranks

Checkpointing = Literal["none", "selective", "block"]


@dataclass(frozen=True)
class LocalShard:
    """What this rank owns of one parameter: some of its rows, or all of it in a lone process.

    Taken before the first forward pass: between a forward and a backward pass the attributes of
    an FSDP root hold the gathered parameters instead.
    """

    name: str
    parameter: nn.Parameter
    """A DTensor under FSDP, otherwise plain."""

    @property
    def whole_shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def local(self) -> Tensor:
        """The rows held here, a plain tensor that shares the parameter's storage."""
        return local_part(self.parameter.detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient of those rows, a plain tensor that shares its storage."""
        grad = self.parameter.grad
        return None if grad is None else local_part(grad)

    @property
    def num_shards(self) -> int:
        """Ranks that hold one copy of the parameter between them."""
        mesh = self._shard_mesh()
        return 1 if mesh is None else mesh.size()

    @property
    def shard_index(self) -> int:
        """This rank's place among them."""
        mesh = self._shard_mesh()
        return 0 if mesh is None else mesh.get_local_rank()

    @property
    def rows(self) -> slice:
        """The rows held here, as a range of the whole parameter's first dimension."""
        rows = shard_rows(self.whole_shape[0], self.shard_index, self.num_shards)
        assert rows.stop - rows.start == len(self.local), "FSDP deals rows out as torch.chunk does"
        return rows

    def like(self, local: Tensor) -> Tensor:
        """`local`, one value for each of the rows' elements, laid out over the ranks as they are.

        A DTensor under FSDP, which a checkpoint can cut anew; otherwise `local` itself.
        """
        if not isinstance(self.parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            self.parameter.device_mesh,
            self.parameter.placements,
            run_check=False,
            shape=self.parameter.shape,
            stride=self.parameter.stride(),
        )

    def _shard_mesh(self) -> DeviceMesh | None:
        if not isinstance(self.parameter, DTensor):
            return None
        mesh = self.parameter.device_mesh
        return mesh if mesh.ndim == 1 else mesh["shard"]


def wrapped(model: Decoder, methods: Sequence[Method]) -> Decoder:
    """With what the methods change of it, in place."""
    for method in methods:
        method.wrap(model)
    return model


def shard_rows(num_rows: int, index: int, num_shards: int) -> slice:
    """Rows of shard `index`: FSDP gives every shard ceil(rows / shards) while there are any."""
    each = -(-num_rows // num_shards)
    return slice(min(index * each, num_rows), min((index + 1) * each, num_rows))


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor is its own."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard(
    model: Decoder, ranks: Ranks, compute_dtype: torch.dtype, ranks_per_copy: int | None = None
) -> list[LocalShard]:
    """`fully_shard` every block and the root, in place; compute in `compute_dtype`.

    ranks_per_copy  ranks that hold one copy of the model between them; by default all. Fewer make
                    the sharding hybrid: gathered within such a group, gradients reduced over all

    A lone process that computes in its masters' dtype has nothing to shard or cast, and keeps the
    model as it is. Gradients are averaged over ranks, in float32. The model may lie on `meta`.
    """
    masters = next(model.parameters()).dtype
    if ranks.world_size > 1 or compute_dtype != masters:
        mesh = _mesh(ranks, ranks_per_copy or ranks.world_size)
        # Inputs are not cast: the rotary phases must stay float32, and ids are integers.
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return local_shards(model)


def all_shards(model: nn.Module) -> list[LocalShard]:
    """This rank's part of every parameter, in the model's order."""
    return [LocalShard(name, p) for name, p in model.named_parameters()]


def local_shards(model: nn.Module) -> list[LocalShard]:
    """This rank's part of every trained parameter, in the model's order."""
    return [shard for shard in all_shards(model) if shard.parameter.requires_grad]


def _mesh(ranks: Ranks, ranks_per_copy: int) -> DeviceMesh:
    if ranks.world_size % ranks_per_copy:
        raise UserError(
            f"--shard-ranks {ranks_per_copy}: {ranks.world_size} ranks cannot be dealt out to "
            "copies of so many; give a divisor"
        )
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented)
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if ranks_per_copy == ranks.world_size:
        return init_device_mesh(ranks.device.type, (ranks.world_size,))
    return init_device_mesh(
        ranks.device.type,
        (ranks.world_size // ranks_per_copy, ranks_per_copy),
        mesh_dim_names=("replicate", "shard"),
    )


def checkpoint_activations(model: Decoder, kind: Checkpointing) -> None:
    """Keep fewer activations for the backward pass, and compute them again there.

    block      keep the input of each block alone
    selective  keep the attention's result and every second matrix product as well: most of the
               memory for a fraction of the recomputation

    To be applied before `shard`, so that a block gathers its parameters once for both.
    """
    if kind == "none":
        return
    for block in model.layers:
        extra = {"context_fn": _selective_contexts} if kind == "selective" else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **extra)


def compile_blocks(model: Decoder) -> None:
    """`torch.compile` each block's forward pass; after `checkpoint_activations`, before `shard`.

    Blocks are alike, so that the first one's code serves all.
    """
    for block in model.layers:
        block.forward = torch.compile(block.forward)


def _selective_contexts() -> tuple[object, object]:
    """One policy for the forward pass and one for its repetition, which count alike."""
    return create_selective_checkpoint_contexts(_EverySecondProduct())


class _EverySecondProduct:
    """Which results of a block are kept: attention's, and every second matrix product."""

    def __init__(self) -> None:
        self.num_products = {False: 0, True: 0}

    def __call__(
        self, ctx: object, op: object, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        name = str(op)
        if "attention" in name or "attn" in name:
            return CheckpointPolicy.MUST_SAVE
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            is_recompute = bool(getattr(ctx, "is_recompute", False))
            self.num_products[is_recompute] += 1
            if self.num_products[is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def full_parameters(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, one after the other. A collective: all ranks must exhaust it."""
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward pass leaves the root's parameters gathered, in compute dtype
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
