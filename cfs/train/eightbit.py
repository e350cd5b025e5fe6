"""AdamW's moments in 8 bits, by the kernels of bitsandbytes (Dettmers et al., arXiv 2110.02861).

An element is what its code stands for, in [-1, 1], times the largest magnitude of its block. Blocks
end at multiples of their size in the whole parameter, and where a rank's rows end. So all numbers
of ranks have the same ones, but for those that a rank's end cuts in two; there are none where the
width of the matrix is a multiple of `BLOCK`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.train.moments import BETA1, EPS, element_range, state_key, zeros_like_rows
from cfs.train.parallel import LocalShard, shard_rows

BLOCK = 256
"""Elements that share a scale; bitsandbytes' optimizers know no other number."""

MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep float32 moments, as in bitsandbytes by default."""


def bitsandbytes_functional() -> Any:
    """bitsandbytes' functions; the one place that imports them.

    Raises `UserError` where that fails.
    """
    # It warns of 4-bit kernels that it has not found on a model hub; nothing here uses them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--optimizer adamw8bit: bitsandbytes cannot be imported ({reason}); "
            "pip install bitsandbytes, or use --optimizer adamw"
        ) from error
    return bitsandbytes.functional


class EightBitMoments:
    """As `FloatMoments`, in a quarter of the memory."""

    def __init__(self, shard: LocalShard) -> None:
        self.num_updates = 0
        self.span = element_range(shard.whole_shape, shard.rows)
        self._shard = shard
        self._functional = bitsandbytes_functional()
        signed, unsigned = _code_maps(shard.local.device)
        self._moments = {
            "exp_avg": _Quantized(shard, self.span, signed),
            "exp_avg_sq": _Quantized(shard, self.span, unsigned),
        }

    def update(
        self,
        weights: Tensor,
        grad: Tensor,
        place: range,
        lr: float,
        weight_decay: float,
        beta2: float,
    ) -> None:
        """As `FloatMoments.update`; `place` is one of `pieces`."""
        piece = slice(place.start - self.span.start, place.stop - self.span.start)
        first = place.start // BLOCK - self.span.start // BLOCK
        blocks = slice(first, first + num_blocks(place))
        exp_avg, exp_avg_sq = self._moments.values()
        self._functional.optimizer_update_8bit_blockwise(
            "adam",  # with decoupled decay: the name that bitsandbytes' AdamW8bit gives, too
            g=grad,
            p=weights,
            state1=exp_avg.codes.view(-1)[piece],
            state2=exp_avg_sq.codes.view(-1)[piece],
            beta1=BETA1,
            beta2=beta2,
            beta3=0.0,
            alpha=0.0,
            eps=EPS,
            step=self.num_updates,
            lr=lr,
            qmap1=exp_avg.code_map,
            qmap2=exp_avg_sq.code_map,
            absmax1=exp_avg.absmax[blocks],
            absmax2=exp_avg_sq.absmax[blocks],
            weight_decay=weight_decay,
        )

    def mean(self) -> Tensor:
        """As `FloatMoments.mean`; a copy, as the codes say it."""
        return self._moments["exp_avg"].values(self.span)

    def tensors(self) -> dict[str, Tensor]:
        """As `FloatMoments.tensors`; the scales' keys end in the shard whose blocks they are of."""
        shard = self._shard
        found = {}
        for name, moment in self._moments.items():
            found[state_key(name, shard.name)] = shard.like(moment.codes)
            if self.span:
                found[self._absmax_key(name, shard.shard_index)] = moment.absmax
        return found

    def wanted(self, num_shards: int) -> dict[str, Tensor]:
        """As `FloatMoments.wanted`: the codes, and room for the scales of each shard that held
        some of this rank's rows."""
        found = {}
        for name, moment in self._moments.items():
            found[state_key(name, self._shard.name)] = self._shard.like(moment.codes)
            for index, span in self._overlapping(num_shards).items():
                scales = moment.absmax.new_empty(num_blocks(span))
                found[self._absmax_key(name, index)] = scales
        return found

    def accept(self, saved: dict[str, Tensor], num_shards: int) -> None:
        """As `FloatMoments.accept`: bit for bit in the blocks that the shards of then and now
        have in common; the others are quantised anew."""
        spans = self._overlapping(num_shards)
        for name, moment in self._moments.items():
            scales = [saved[self._absmax_key(name, index)] for index in spans]
            if scales:
                moment.take(torch.cat(scales), list(spans.values()), self.span)

    def _overlapping(self, num_shards: int) -> dict[int, range]:
        """Of so many shards, by index, the elements of those that hold some of this rank's."""
        shape = self._shard.whole_shape
        spans = {
            index: element_range(shape, shard_rows(shape[0], index, num_shards))
            for index in range(num_shards)
        }
        own = self.span
        return {
            index: span
            for index, span in spans.items()
            if max(span.start, own.start) < min(span.stop, own.stop)
        }

    def _absmax_key(self, moment: str, index: int) -> str:
        return state_key(f"{moment}_absmax", f"{self._shard.name}.{index}")


class _Quantized:
    """One moment: codes (rows, ...) uint8, absmax (blocks,) float32, code_map (256,) float32."""

    def __init__(self, shard: LocalShard, span: range, code_map: Tensor) -> None:
        self.codes = zeros_like_rows(shard, torch.uint8)
        self.absmax = code_map.new_zeros(num_blocks(span))
        self.code_map = code_map

    def values(self, span: range) -> Tensor:
        """(elements of `span`,) float32, what the codes of the rank's elements stand for."""
        starts, stops = block_edges(span)
        scales = self.absmax.repeat_interleave((stops - starts).to(self.absmax.device))
        return self.code_map[self.codes.view(-1).int()] * scales

    def take(self, old_absmax: Tensor, old_spans: list[range], span: range) -> None:
        """Give the codes, as the blocks of other spans have scaled them, blocks of their own.

        old_absmax  (blocks of `old_spans`,) float32
        old_spans   ascending; they cover `span`, where the codes lie
        """
        edges = zip(*map(block_edges, old_spans), strict=True)
        old_starts, old_stops = (torch.cat(part) for part in edges)
        starts, stops = block_edges(span)
        first = torch.searchsorted(old_starts, starts, right=True) - 1
        last = torch.searchsorted(old_starts, stops - 1, right=True) - 1
        is_kept = (old_starts[first] == starts) & (old_stops[first] == stops)
        self.absmax.copy_(old_absmax[first.to(old_absmax.device)])
        for block in (~is_kept).nonzero().flatten().tolist():
            begin, end = int(starts[block]), int(stops[block])
            old = slice(int(first[block]), int(last[block]) + 1)
            shares = old_stops[old].clamp(max=end) - old_starts[old].clamp(min=begin)
            scales = old_absmax[old].repeat_interleave(shares.to(old_absmax.device))
            codes = self.codes.view(-1)[begin - span.start : end - span.start]
            values = self.code_map[codes.int()] * scales
            anew, state = bitsandbytes_functional().quantize_blockwise(
                values, self.code_map, blocksize=BLOCK
            )
            codes.copy_(anew)
            self.absmax[block] = state.absmax[0]


@lru_cache
def _code_maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of the mean and of the mean square, which is not negative, stand for."""
    create = bitsandbytes_functional().create_dynamic_map
    return create(signed=True).to(device), create(signed=False).to(device)


def num_blocks(span: range) -> int:
    return -(-span.stop // BLOCK) - span.start // BLOCK if span else 0


def block_edges(span: range) -> tuple[Tensor, Tensor]:
    """Where each block of a rank's elements begins and where it ends, int64 on the host."""
    starts = torch.arange(span.start // BLOCK * BLOCK, span.stop, BLOCK)
    return starts.clamp(min=span.start), (starts + BLOCK).clamp(max=span.stop)


def pieces(span: range, size: int) -> Iterator[range]:
    """Cut a rank's elements where blocks end: at the first such place, then after every `size`.

    size  a multiple of `BLOCK`
    """
    start = span.start
    while start < span.stop:
        cut = start + (BLOCK - start % BLOCK if start % BLOCK else size)
        yield range(start, min(cut, span.stop))
        start = cut
