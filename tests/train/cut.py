"""Parameters cut into the rows of several ranks in one process, and their states put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfs.train.optim import OptimizerKind, ShardedAdamW
from cfs.train.parallel import LocalShard, shard_rows

Tensors = dict[str, Tensor]

SHAPES = {
    "lined_up": (64, 64),  # 2 and 4 ranks cut it between blocks of 256
    "uneven": (97, 65),
    "small": (60, 64),
    "three_rows": (3, 2048),  # nothing is left for the last of 4 ranks
    "gain": (64,),
    "long_gain": (4096,),
}
WEIGHT_DECAY, BETA2, SEED = 0.1, 0.999, 7


@dataclass(frozen=True)
class CutShard(LocalShard):
    """A plain parameter that says it is one of `count` ranks' rows."""

    shape: torch.Size
    index: int
    count: int

    @property
    def whole_shape(self) -> torch.Size:
        return self.shape

    @property
    def num_shards(self) -> int:
        return self.count

    @property
    def shard_index(self) -> int:
        return self.index


class CutRun:
    """`count` ranks' optimizers over one set of weights."""

    def __init__(
        self, weights: Tensors, kind: OptimizerKind, count: int, weight_decay: float = WEIGHT_DECAY
    ) -> None:
        self.shards = [
            [
                CutShard(
                    name,
                    nn.Parameter(value[shard_rows(len(value), index, count)].clone()),
                    value.shape,
                    index,
                    count,
                )
                for name, value in weights.items()
            ]
            for index in range(count)
        ]
        self.optimizers = [
            ShardedAdamW(own, kind, weight_decay, BETA2, SEED)  # type: ignore[arg-type]
            for own in self.shards
        ]

    def step(self, grads: Tensors, lr: float, step: int, scale: float = 1.0) -> None:
        for own, optimizer in zip(self.shards, self.optimizers, strict=True):
            for shard in own:
                if shard.name in grads:
                    rows = grads[shard.name][shard.rows]
                    shard.parameter.grad = rows.to(shard.parameter.dtype, copy=True)
            optimizer.step(lr, step, scale)
            assert all(shard.parameter.grad is None for shard in own), "gradients are freed"

    def weights(self) -> Tensors:
        parts = zip(*self.shards, strict=True)
        return {same[0].name: torch.cat([s.local for s in same]) for same in parts}

    def saved(self) -> Tensors:
        """What a checkpoint would hold: the parts of one name joined, scales as they are."""
        parts: dict[str, list[Tensor]] = {}
        for optimizer in self.optimizers:
            for name, value in optimizer.state_tensors().items():
                parts.setdefault(name, []).append(value.clone())
        return {name: torch.cat(values) for name, values in parts.items()}

    def load(self, other: CutRun) -> None:
        """The states of a run on any number of ranks; the weights are the caller's."""
        saved, facts = other.saved(), other.optimizers[0].state_facts()
        for own, optimizer in zip(self.shards, self.optimizers, strict=True):
            optimizer.load_state(facts, _reader(saved, own))


def _reader(saved: Tensors, shards: list[CutShard]) -> Callable[[Tensors], None]:
    def read(tensors: Tensors) -> None:
        for key, value in tensors.items():
            if "_absmax." in key:
                value.copy_(saved[key])
            else:
                shard = next(s for s in shards if key.endswith("." + s.name))
                value.copy_(saved[key][shard.rows])

    return read


def random_weights(dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).mul(0.02).to(dtype)
        for name, shape in SHAPES.items()
    }


def random_grads(step: int) -> Tensors:
    """Scales that differ over elements, as a model's do, some direction and more noise."""
    fixed, noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(100 + step)
    grads = {}
    for name, shape in SHAPES.items():
        scale = torch.randn(shape, generator=fixed).exp().mul(1e-3)
        direction = torch.randn(shape, generator=fixed)
        grads[name] = scale * (direction + 2 * torch.randn(shape, generator=noise))
    return grads


def trained(
    kind: OptimizerKind, count: int, steps: int, dtype: torch.dtype = torch.float32
) -> CutRun:
    run = CutRun(random_weights(dtype), kind, count)
    for step in range(steps):
        run.step(random_grads(step), 1e-3, step)
    return run
