"""The one gate to attention kernels: causal batches, prompts into a cache, cached decoding.

A model calls `context.attend(layer, q, k, v)` and never learns which of the three it serves.

Shapes: B rows, T new positions, S cached positions, H heads, K KV heads, C channels per head.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cfs.model.kv_cache import KVCache


class AttentionContext(Protocol):
    """Where the positions of a forward pass lie and what each may attend to."""

    position_ids: Tensor
    """(T,) or (B, T) int64, position of each new token in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, T, C), k and v (B, K, T, C) -> (B, H, T, C)."""
        ...


class CausalBatch:
    """Whole sequences from position 0; right padding needs no mask, as nothing looks right."""

    def __init__(self, num_positions: int, device: torch.device) -> None:
        self.position_ids = torch.arange(num_positions, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Prefill:
    """Prompts from position 0 into chosen cache rows, right-padded to one length.

    What padding writes behind a shorter prompt is masked until decoding overwrites it.
    """

    def __init__(self, cache: KVCache, rows: Tensor, num_positions: int) -> None:
        self.cache, self.rows = cache, rows
        self.position_ids = torch.arange(num_positions, device=rows.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write_prompts(layer, self.rows, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class DecodeStep:
    """One new token in every cache row, each at a position of its own."""

    def __init__(self, cache: KVCache, positions: Tensor, num_filled: int) -> None:
        """positions (B,) int64; num_filled: 1 + the largest position, so that attention reads
        the filled part of the cache and no more."""
        self.cache, self.positions, self.num_filled = cache, positions, num_filled
        self.position_ids = positions[:, None]
        filled = torch.arange(num_filled, device=positions.device)
        self.mask = (filled <= positions[:, None])[:, None, None, :]  # (B, 1, 1, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.append(layer, self.positions, k, v, self.num_filled)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The oracle: softmax(q k^T / sqrt(C)) v written out, in float32.

    q (B, H, T, C); k, v (B, K, S, C); mask broadcastable to (B, H, T, S) bool, True = attend.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)
