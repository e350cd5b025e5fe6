"""Cached decoding against the full forward pass."""

from __future__ import annotations

import pytest
import torch

from cfs.model import Decoder
from cfs.model.attention import CausalBatch, DecodeStep, Prefill, Span, plain_attention
from cfs.model.kv_cache import KVCache
from tests.conftest import tiny_model

FAMILIES = [("olmo", {}), ("llama", {"num_key_value_heads": 2})]


def groups(at: torch.Tensor, size: int) -> list[Span]:
    """Rows in groups of `size`, each with the length that its fullest row has filled."""
    starts = range(0, len(at), size)
    return [Span(slice(s, s + size), int(at[s : s + size].max()) + 1) for s in starts]


def decode_all(
    model: Decoder, ids: torch.Tensor, prefill: list[int], size: int = 8, by_position: bool = False
) -> torch.Tensor:
    """Logits (B, T, V) by decoding row b from position `prefill[b]`, the prompt put in before."""
    rows, num_positions = ids.shape
    cache = KVCache(model.config, rows, num_positions, torch.float32, "cpu", by_position)
    longest = max(prefill)
    if longest:
        context = Prefill(cache, torch.arange(rows), longest)
        model.hidden_states(ids[:, :longest], context)
    logits = torch.full((rows, num_positions, model.config.vocab_size), float("nan"))
    positions = torch.tensor(prefill)
    while bool((positions < num_positions).any()):
        at = positions.clamp(max=num_positions - 1)
        step = DecodeStep(cache, at, groups(at, size))
        logits[torch.arange(rows), at] = model(ids.gather(1, at[:, None]), context=step)[:, 0]
        positions += 1
    return logits


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("prefill", [[0, 0, 0], [5, 2, 9]])
@pytest.mark.parametrize(("size", "by_position"), [(8, False), (2, False), (1, True)])
@torch.no_grad()
def test_cached_decoding_equals_full_forward(
    family: str, options: dict[str, object], prefill: list[int], size: int, by_position: bool
) -> None:
    """Catches a wrong position, mask or cache row, for rows of unequal progress."""
    model = tiny_model(family, **options)
    ids = torch.randint(0, 97, (3, 20))
    full = model(ids)
    cached = decode_all(model, ids, prefill, size, by_position)
    for row, start in enumerate(prefill):
        torch.testing.assert_close(cached[row, start:], full[row, start:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_right_padding_changes_nothing() -> None:
    """Catches attention to padding: a row alone equals that row in a padded batch."""
    model = tiny_model("llama")
    ids = torch.randint(0, 97, (2, 16))
    padded = ids.clone()
    padded[0, 7:] = 0
    torch.testing.assert_close(model(ids[:1, :7])[0], model(padded)[0, :7], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_lone_seed_token_works() -> None:
    """Catches shapes that break at one row and one position."""
    model = tiny_model()
    assert model(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, 97)


def test_attention_equals_the_formula() -> None:
    """Catches a wrong scale, mask or pairing of query heads with KV heads."""
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    context = CausalBatch(9, q.device)
    torch.testing.assert_close(context.attend(0, q, k, v), plain_attention(q, k, v, mask))
