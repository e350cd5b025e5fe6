"""Several ranks in one process: threads that meet wherever they add up a tensor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor, nn

from cfs.baselines.method import Method, Setting
from tests.train.cut import CutRun, CutShard, Tensors

Result = TypeVar("Result")
Total = Callable[[Tensor], Tensor]

PATIENCE_S = 10


def in_lockstep(count: int, work: Callable[[int, Total], Result]) -> list[Result]:
    """What `work(rank, total)` gives on each rank; `total` is `Setting.total`."""
    barrier = Barrier(count, timeout=PATIENCE_S)
    given: list[Tensor] = [torch.empty(0)] * count

    def on_rank(rank: int) -> Result:
        def total(values: Tensor) -> Tensor:
            given[rank] = values.clone()
            barrier.wait()
            values.copy_(torch.stack(given).sum(0))
            barrier.wait()
            return values

        return work(rank, total)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(on_rank, range(count)))


def train(
    make: Callable[[], Method],
    run: CutRun,
    grads: list[Tensors],
    lr: float,
    original: Tensors | None = None,
    tuned: Tensors | None = None,
) -> None:
    """Take a step for each of `grads` on all ranks of `run`, in the loop's order.

    original, tuned  whole parameters by name, where the method needs them
    """

    def work(rank: int, total: Total) -> None:
        shards, method = run.shards[rank], make()
        method.begin(
            Setting(
                shards=list(shards),
                original=_rows(original, shards),
                initial=[],
                tuned=[_rows(tuned, shards)],
                total=total,
                num_steps=len(grads),
            )
        )
        for step, grad in enumerate(grads):
            for shard in shards:
                rows = grad[shard.name][shard.rows]
                shard.parameter.grad = rows.to(shard.parameter.dtype, copy=True)
            method.before_step(step)
            filters = [method.after_update] if method.filters else []
            run.optimizers[rank].step(lr, step, after_update=filters)

    in_lockstep(len(run.shards), work)


def lone_setting(
    shards: list[CutShard], original: list[Tensor], tuned: list[list[Tensor]]
) -> Setting:
    """What a method is given on one rank."""
    return Setting(
        shards=list(shards),
        original=original,
        initial=[],
        tuned=tuned,
        total=lambda values: values,
        num_steps=1,
    )


def lone_shard(name: str, value: Tensor) -> CutShard:
    """A whole parameter, as a lone rank holds it."""
    return CutShard(name, nn.Parameter(value.clone()), value.shape, 0, 1)


def _rows(whole: Tensors | None, shards: list[CutShard]) -> list[Tensor]:
    return [] if whole is None else [whole[shard.name][shard.rows] for shard in shards]
