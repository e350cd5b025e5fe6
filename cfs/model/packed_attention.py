"""Causal attention of documents that lie end to end in one row and never see each other.

Shapes: T positions of all documents together, H heads, K KV heads, C channels per head.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfs.model.attention import VARLEN_OPTIONS, Route, choose_training_route

HALF_PRECISION = (torch.bfloat16, torch.float16)
VARLEN_KNOWS_GQA = "enable_gqa" in VARLEN_OPTIONS


class PackedBatch:
    """One row of documents; its state never changes, so that a block can be run twice with it.

    position_ids  (T,) int64, from 0 in every document
    cu_seqlens    (documents + 1,) int32, where each document starts, and T
    max_seqlen    a length that none exceeds: a power of two, so that compiled code meets few
    """

    def __init__(
        self, lengths: list[int], device: torch.device, route: Route | None = None
    ) -> None:
        """lengths  positions of each document, in order; equal ones side by side cost least
        route    kernel to take; None for the best that the device and the dtype allow
        """
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        positions = torch.arange(sum(lengths)) - (ends - sizes).repeat_interleave(sizes)
        self.position_ids = positions.to(device)
        self.cu_seqlens = F.pad(ends, (1, 0)).to(device, torch.int32)
        self.max_seqlen = 1 << (max(lengths) - 1).bit_length()
        self.runs = [(len(list(same)), length) for length, same in groupby(lengths)]
        self.is_chosen = route is not None
        self.route: Route = route or _best_route(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, T, C), k and v (1, K, T, C) -> (1, H, T, C)."""
        q, k, v = (x.transpose(1, 2).squeeze(0) for x in (q, k, v))
        takes_plain = q.dtype not in HALF_PRECISION and not self.is_chosen
        if self.route == "sdpa" or takes_plain:
            mixed = self._by_document(q, k, v)  # pyright: ignore (disable's type binds no self)
        elif self.route == "flash":
            mixed = _flash(q, k, v, self.cu_seqlens, self.max_seqlen)
        else:
            mixed = _varlen(q, k, v, self.cu_seqlens, self.max_seqlen)
        return mixed.unsqueeze(0).transpose(1, 2)

    # Lengths differ from batch to batch, and dynamo would compile anew for each list of them.
    @torch.compiler.disable
    def _by_document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Plain torch: no (T, T) mask, one batched call for each run of equal lengths.

        q (T, H, C), k and v (T, K, C) -> (T, H, C).
        """
        sizes = [num_documents * length for num_documents, length in self.runs]
        # split's backward pass concatenates; that of slices would add up T positions for each.
        pieces = (x.split(sizes) for x in (q, k, v))
        mixed = []
        for run, *qkv in zip(self.runs, *pieces, strict=True):
            q, k, v = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed.append(y.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)


@cache
def _best_route(device: torch.device) -> Route:
    """The best route of half precision; a search for packages, hence once."""
    return choose_training_route("auto", device, torch.bfloat16)


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The flash-attn package; shapes as in `PackedBatch._by_document`."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's own flash kernel; shapes as in `PackedBatch._by_document`."""
    from torch.nn.attention.varlen import varlen_attn

    options: Any = {"window_size": (-1, 0)}  # causal
    if VARLEN_KNOWS_GQA:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mixed = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    assert isinstance(mixed, Tensor), "only return_aux makes it a pair"
    return mixed
