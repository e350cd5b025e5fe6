"""What only a GPU can show of the sampler: graphs that replay the step that was written."""

from __future__ import annotations

import pytest
import torch

from cfs.model.attention import ROUTES, Route, why_not
from cfs.sample.nucleus import by_bisection, by_sort
from cfs.sample.sample import Request, SamplingSettings
from cfs.sample.sampler import generate
from tests.conftest import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("route", ROUTES)
def test_graphs_draw_what_the_cpu_draws(route: Route) -> None:
    """Catches a graph over stale tensors, slots that move under it, a wrong warm-up."""
    dtype = torch.float32 if route == "sdpa" else torch.bfloat16
    if (reason := why_not(route, torch.device("cuda"), dtype)) is not None:
        pytest.skip(reason)
    settings = SamplingSettings(max_tokens=40, top_p=0.9, seed=3)
    prompts = [[0, *range(1, 1 + i % 5)] for i in range(200)]
    texts = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", hidden_size=64, num_attention_heads=2, head_dim=32,
                           num_key_value_heads=2, vocab_size=12).to(device, dtype)  # fmt: skip
        requests = [Request(i, prompt) for i, prompt in enumerate(prompts)]
        samples = generate(
            model, requests, settings, 0, 12, 48, 5, attention=route if device == "cuda" else "auto"
        )
        texts.append({s.index: s.input_ids.tolist() for s in samples})
    assert len(texts[1]) == 200
    same = sum(texts[0][i] == texts[1][i] for i in range(200))
    assert same >= (198 if dtype == torch.float32 else 100), "up to rounding at a boundary"


def test_one_generation_after_another() -> None:
    """Catches graphs that outlive their generation, and a cache that is not let go."""
    model = tiny_model(vocab_size=12).to("cuda")
    settings = SamplingSettings(max_tokens=20)
    used = []
    for slots in (64, 32, 64, 16):
        samples = list(
            generate(model, [Request(i, [0]) for i in range(150)], settings, 0, 12, slots)
        )
        assert len(samples) == 150
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_allocated())
    assert max(used) - min(used) < 2**22


def test_bisection_equals_the_sort() -> None:
    """Catches a compiled kernel that sums something else."""
    for vocabulary in (1019, 50_304, 128_256):
        logits = 2 * torch.randn(64, vocabulary, device="cuda")
        weights, _, _ = by_bisection(logits, 0.95)
        expected, _, _ = by_sort(logits, 0.95)
        assert torch.equal(weights, expected)
