"""The one gate to attention kernels: causal batches, prompts into a cache, cached decoding.

A model calls `context.attend(layer, q, k, v)` and never learns which of them it serves, or whether
it serves the packed documents of `cfs.model.packed_attention`. Decoding and packed training have
three routes: the flash-attn package, torch's varlen kernel, and plain torch.

Shapes: B rows, T new positions, S cached positions, H heads, K KV heads, C channels per head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cfs.errors import UserError
from cfs.model.kv_cache import KVCache

Route = Literal["flash", "varlen", "sdpa"]
AskedRoute = Literal["auto", "flash", "varlen", "sdpa"]
ROUTES: tuple[Route, ...] = ("flash", "varlen", "sdpa")
"""Kernels, the best first; sdpa is plain torch and runs anywhere."""


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

    def __init__(
        self,
        cache: KVCache,
        positions: Tensor,
        spans: Sequence[Span],
        route: Route = "sdpa",
    ) -> None:
        """positions  (B,) int64, of the new tokens
        spans      the rows in groups, and how far each group is filled with the new tokens: no
                   route but flash and varlen, which look up each row's own fill, reads beyond it
        """
        self.cache, self.positions, self.route = cache, positions, route
        self.position_ids = positions[:, None]
        if route == "sdpa":
            self.groups = [(span, _bias(positions, span, cache.keys.dtype)) for span in spans]
        else:
            self.num_used = (positions + 1).to(torch.int32)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        cache.append(layer, self.positions, k, v)
        keys, values = cache.keys[layer], cache.values[layer]
        if self.route == "flash":
            return _flash_decode(q, keys, values, self.num_used)
        if self.route == "varlen":
            return _varlen_decode(q, keys, values, self.num_used)
        # On CUDA, torch's kernel takes a mask with as many heads of keys as of queries only.
        is_plain = q.device.type == "cpu" or q.shape[1] != keys.shape[1]
        one_query = _two_products if is_plain else _masked_sdpa
        mixed = [
            one_query(
                q[s.rows], keys[s.rows, :, : s.num_filled], values[s.rows, :, : s.num_filled], bias
            )
            for s, bias in self.groups
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class Span(NamedTuple):
    """Cache rows next to each other, none of them filled beyond `num_filled` positions."""

    rows: slice
    num_filled: int


def _bias(positions: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """(R, 1, 1, S), 0 where the row is filled and -inf behind that."""
    places = torch.arange(span.num_filled, device=positions.device)
    hidden = (places > positions[span.rows, None])[:, None, None, :]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, float("-inf")
    )


def _two_products(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of one query, written out: on a CPU torch's kernel is made for many queries.

    q (R, H, 1, C), keys and values (R, K, S, C), bias (R, 1, 1, S) -> (R, H, 1, C).
    """
    num_rows, num_heads, _, width = q.shape
    grouped = q.reshape(num_rows * keys.shape[1], -1, width) / math.sqrt(width)
    scores = torch.bmm(keys.flatten(0, 1), grouped.transpose(1, 2)).transpose(1, 2)
    scores = scores.reshape(num_rows, keys.shape[1], -1, keys.shape[2]) + bias
    weights = scores.float().softmax(-1).to(values.dtype).flatten(0, 1)
    return torch.bmm(weights, values.flatten(0, 1)).view(num_rows, num_heads, 1, width)


def _masked_sdpa(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)


def _flash_decode(q: Tensor, keys: Tensor, values: Tensor, num_used: Tensor) -> Tensor:
    """The flash-attn package; num_used (B,) int32 positions of each row."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    by_position = (x.transpose(1, 2) for x in (q, keys, values))
    mixed = flash_attn_with_kvcache(*by_position, cache_seqlens=num_used, causal=True)
    return mixed.transpose(1, 2)


def _varlen_decode(q: Tensor, keys: Tensor, values: Tensor, num_used: Tensor) -> Tensor:
    """torch's own flash kernel; the cache lies position by position, B rows of S."""
    from torch.nn.attention.varlen import varlen_attn

    num_rows, _, num_positions, _ = keys.shape
    ends = torch.arange(num_rows + 1, dtype=torch.int32, device=q.device)
    mixed = varlen_attn(
        q.squeeze(2),
        keys.transpose(1, 2).flatten(0, 1),
        values.transpose(1, 2).flatten(0, 1),
        ends,
        ends * num_positions,
        1,
        num_positions,
        enable_gqa=True,
        seqused_k=num_used,
    )
    assert isinstance(mixed, Tensor), "only return_aux makes it a pair"
    return mixed.unsqueeze(2)


# ------------------------------------------------------------------------------ which route


def choose_route(asked: AskedRoute, device: torch.device, dtype: torch.dtype) -> Route:
    """The decode route to take. `UserError` where the one asked for is not available here."""
    return _choose(asked, [(route, why_not(route, device, dtype)) for route in ROUTES])


def choose_training_route(asked: AskedRoute, device: torch.device, dtype: torch.dtype) -> Route:
    """The same for packed documents, whose kernels need no cache (`cfs.model.packed_attention`)."""
    return _choose(asked, [(route, why_not_training(route, device, dtype)) for route in ROUTES])


def _choose(asked: AskedRoute, states: list[tuple[Route, str | None]]) -> Route:
    for route, reason in states:
        if asked == route and reason is not None:
            raise UserError(f"--attention {asked}: {reason}; use --attention auto")
        if asked in (route, "auto") and reason is None:
            return route
    raise AssertionError("sdpa is always available")


def _help(use: str, why_not_here: Callable[..., str | None]) -> str:
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    states = [(route, why_not_here(route, device, torch.bfloat16)) for route in ROUTES]
    here = "; ".join(f"{route}: {reason or 'available'}" for route, reason in states)
    return f"kernel of {use}: auto (the best available), {', '.join(ROUTES)}. Here {here}"


def why_not(route: Route, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a decode step of this device and dtype cannot take a route; None if it can."""
    reason = why_not_training(route, device, dtype)
    if reason is None and route == "varlen" and "seqused_k" not in VARLEN_OPTIONS:
        return "torch's varlen_attn lacks seqused_k (2.12 has it)"
    return reason


def why_not_training(route: Route, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed documents of this device and dtype cannot take a route; None if they can."""
    if route == "sdpa":
        return None
    if device.type != "cuda":
        return f"needs CUDA, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if route == "flash":
        try:
            from flash_attn import (  # type: ignore[import-not-found]
                flash_attn_varlen_func,  # noqa: F401
                flash_attn_with_kvcache,  # noqa: F401
            )
        except ImportError as error:
            return f"the package flash-attn cannot be imported ({error})"
        return None
    return None if VARLEN_OPTIONS else "this torch has no varlen_attn"


def _varlen_options() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


VARLEN_OPTIONS = _varlen_options()
"""What this torch's `varlen_attn` can be told; empty where there is none."""

ATTENTION_HELP = _help("the decode step", why_not)
"""One line for `--help`: the routes, and which are available here."""
TRAINING_ATTENTION_HELP = _help("packed documents", why_not_training)
"""The same for training."""


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The oracle: softmax(q k^T / sqrt(C)) v written out, in float32.

    q (B, H, T, C); k, v (B, K, S, C); mask broadcastable to (B, H, T, S) bool, True = attend.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.float() @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)
