"""The decode step as CUDA graphs: one launch instead of the hundreds that a step is made of."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol

import torch
from torch import Tensor

from cfs.model.attention import Route, Span
from cfs.model.kv_cache import KVCache

FILLED_STEP = 128
"""Without flash attention the cache is read to a multiple of this, a graph for each."""


class Stepping(Protocol):
    """What a graph must know of the slots."""

    @property
    def requests(self) -> Sized: ...

    cache: KVCache
    route: Route
    advances: Tensor

    def device_step(self, spans: list[Span]) -> Tensor: ...


class GraphedStep:
    """`device_step`, captured once per number of slots and length of the cache read."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None
        # Not torch's stream for all captures: a graph that is destroyed clears what cuBLAS keeps
        # for its stream, which the graphs of another generation may still use.
        self.stream = torch.cuda.Stream()

    def __call__(self, slots: Stepping, spans: list[Span]) -> Tensor:
        (span,) = spans
        capacity = slots.cache.keys.shape[3]
        num_filled = capacity  # flash and varlen look up each row's fill themselves
        if slots.route == "sdpa":
            num_filled = min(capacity, -(-span.num_filled // FILLED_STEP) * FILLED_STEP)
        key = (len(slots.requests), num_filled)
        if key not in self.graphs:
            self.graphs[key] = self._capture(slots, Span(span.rows, num_filled))
        graph, flags = self.graphs[key]
        graph.replay()
        return flags

    def _capture(self, slots: Stepping, span: Span) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Run the step without advancing anybody, as kernels are compiled and chosen on first
        use, then record it. Graphs of another number of slots, and their memory, are let go."""
        self.graphs = {k: g for k, g in self.graphs.items() if k[0] == len(slots.requests)}
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()
        at_work = slots.advances.clone()
        slots.advances.zero_()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                slots.device_step([span])
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            flags = slots.device_step([span])
        slots.advances.copy_(at_work)
        return graph, flags
