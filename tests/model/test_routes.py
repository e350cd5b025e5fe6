"""The routes of a decode step: each against attention written out, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cfs.errors import UserError
from cfs.model.attention import (
    ROUTES,
    DecodeStep,
    Route,
    Span,
    choose_route,
    choose_training_route,
    plain_attention,
    why_not,
    why_not_training,
)
from cfs.model.config import parse_config
from cfs.model.kv_cache import KVCache
from tests.conftest import tiny_config

CPU = torch.device("cpu")
HEADS, WIDTH, CAPACITY = 8, 64, 40


def step_and_oracle(
    route: Route, kv_heads: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One decode step of 5 rows of unequal fill, and the formula on the same cache."""
    config = parse_config(
        tiny_config(
            "llama",
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            num_hidden_layers=1,
        )
    )
    cache = KVCache(config, 5, CAPACITY, dtype, device, by_position=route != "sdpa")
    cache.keys.normal_()
    cache.values.normal_()
    positions = torch.tensor([0, 7, 39, 3, 21], device=device)
    q = torch.randn(5, HEADS, 1, WIDTH, device=device, dtype=dtype)
    k, v = torch.randn(2, 5, kv_heads, 1, WIDTH, device=device, dtype=dtype)
    spans = [Span(slice(0, 2), 8), Span(slice(2, 4), 40), Span(slice(4, 6), 22)]
    mixed = DecodeStep(cache, positions, spans, route).attend(0, q, k, v)
    mask = (torch.arange(CAPACITY, device=device) <= positions[:, None])[:, None, None, :]
    return mixed, plain_attention(q, cache.keys[0], cache.values[0], mask)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_plain_torch_equals_the_formula(kv_heads: int) -> None:
    """Catches a wrong pairing of heads, scale or mask, and groups put together in another order."""
    mixed, expected = step_and_oracle("sdpa", kv_heads, CPU, torch.float32)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("route", ROUTES)
def test_cuda_routes_equal_the_formula(route: Route, kv_heads: int) -> None:
    """Catches a cache handed to a kernel in another layout than it reads."""
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if (reason := why_not(route, device, torch.bfloat16)) is not None:
        pytest.skip(reason)
    mixed, expected = step_and_oracle(route, kv_heads, device, torch.bfloat16)
    torch.testing.assert_close(mixed, expected, atol=2e-2, rtol=0)


def test_auto_takes_plain_torch_on_a_cpu() -> None:
    assert choose_route("auto", CPU, torch.float32) == "sdpa"
    assert choose_route("sdpa", CPU, torch.float32) == "sdpa"


@pytest.mark.parametrize("route", ["flash", "varlen"])
@pytest.mark.parametrize(
    ("choose", "reason_against"),
    [(choose_route, why_not), (choose_training_route, why_not_training)],
    ids=["decoding", "training"],
)
def test_a_route_that_is_not_there_is_refused(
    route: Route, choose: Callable[..., Route], reason_against: Callable[..., str | None]
) -> None:
    """Catches a silent fallback to another kernel than the one asked for."""
    with pytest.raises(UserError, match=rf"--attention {route}: needs CUDA, not cpu; use"):
        choose(route, CPU, torch.bfloat16)
    reason = reason_against(route, torch.device("cuda"), torch.float32)
    assert reason == "needs bfloat16, not float32"
