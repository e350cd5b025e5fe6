"""Our logits against transformers'. Matching keys and shapes would prove nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.model import load_model, save_model
from cfs.model.config import parse_config
from cfs.model.layers import rope_frequencies, swiglu
from tests.conftest import tiny_config

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OLMO_CASES = [
    ("olmo", {"clip_qkv": clip, "tie_word_embeddings": tied, "num_key_value_heads": kv})
    for clip, tied, kv in itertools.product((None, 0.5), (False, True), (4, 2))
]
LLAMA_CASES = [
    (
        "llama",
        {
            "num_key_value_heads": kv,
            "rope_scaling": scaling,
            "tie_word_embeddings": tied,
            "head_dim": head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": theta,
        },
    )
    for kv, (scaling, theta), tied, head_dim in itertools.product(
        (4, 1), ((None, 10000.0), (LLAMA3, 500000.0)), (False, True), (8, 12)
    )
]


def reference(config: dict[str, object], directory: Path) -> torch.nn.Module:
    """A random transformers model of the config, saved to `directory` as it saves itself."""
    (directory / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(directory), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ordinary scale: random gains, projections that neither vanish nor explode.
            mean, std = (1.0, 0.2) if "norm" in name else (0.0, 1 / parameter.shape[-1] ** 0.5)
            parameter.normal_(mean, std)
    model.save_pretrained(directory)
    return model.eval()


def largest_difference(ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        expected = theirs(ids).logits
        assert 0.1 < expected.std() < 10, "logits of no ordinary scale compare nothing"
        return float((ours(ids) - expected).abs().max())


@pytest.mark.parametrize(("family", "options"), OLMO_CASES + LLAMA_CASES)
def test_logits_equal_transformers(family: str, options: dict[str, object], tmp_path: Path) -> None:
    """Catches any wrong norm, rotation, head grouping, clipping or tie, in every combination."""
    theirs = reference(tiny_config(family, **options), tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(0, 97, (3, 100))
    assert largest_difference(ours, theirs, ids) <= 1e-5


@pytest.mark.parametrize(("family", "options"), [OLMO_CASES[1], LLAMA_CASES[2], LLAMA_CASES[13]])
def test_saved_model_reloads_in_transformers(
    family: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Catches a config or tensor name that only we can read, sharded and whole."""
    (tmp_path / "a").mkdir()
    theirs = reference(tiny_config(family, **options), tmp_path / "a")
    ours = load_model(tmp_path / "a")
    ids = torch.randint(0, 97, (2, 50))
    for name, limit in (("whole", 10**9), ("shards", 20_000)):
        save_model(ours, tmp_path / name, max_shard_bytes=limit)
        index = tmp_path / name / "model.safetensors.index.json"
        assert index.exists() == (name == "shards")
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32
        )
        assert torch.equal(reloaded(ids).logits, theirs(ids).logits)
        assert largest_difference(load_model(tmp_path / name), theirs, ids) <= 1e-5


def test_llama3_frequencies_equal_transformers() -> None:
    """Catches scaling that is absent or blends wrongly, which short prompts do not show."""
    config = tiny_config(
        "llama",
        head_dim=128,
        rope_theta=500000.0,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 8192},
        max_position_embeddings=131072,
    )
    ours = rope_frequencies(parse_config(config))
    hf_config = transformers.LlamaConfig(**config)
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](hf_config)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    unscaled = rope_frequencies(parse_config(config | {"rope_scaling": None}))
    assert torch.equal(ours[:16], unscaled[:16]), "high frequencies are kept"
    torch.testing.assert_close(ours[-16:], unscaled[-16:] / 8)


@pytest.mark.parametrize("scaling", [None, LLAMA3 | {"original_max_position_embeddings": 8192}])
def test_long_positions_equal_transformers(
    scaling: dict[str, object] | None, tmp_path: Path
) -> None:
    """Catches phases that lose precision or skip the scaling beyond 16,000 positions."""
    config = tiny_config(
        "llama", rope_scaling=scaling, rope_theta=500000.0, max_position_embeddings=131072
    )
    theirs = reference(config | {"num_hidden_layers": 1}, tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(0, 97, (1, 16_384))
    with torch.no_grad():
        difference = (ours(ids)[:, -64:] - theirs(ids).logits[:, -64:]).abs().max()
    assert difference <= 1e-5


def test_new_and_old_spelling_of_rope_agree() -> None:
    """Catches reading only one of `rope_scaling` and transformers 5's `rope_parameters`."""
    old = tiny_config("llama", rope_scaling=LLAMA3, rope_theta=500000.0)
    new = tiny_config("llama", rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    assert torch.equal(rope_frequencies(parse_config(old)), rope_frequencies(parse_config(new)))


def test_stories260k_equals_transformers(stories260k: Path) -> None:
    """The same on real weights, which are larger and more uneven than random ones."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    ids = torch.randint(3, 512, (2, 256))
    assert largest_difference(load_model(stories260k), theirs, ids) <= 1e-5


def test_bfloat16_is_as_close_as_transformers_own(stories260k: Path) -> None:
    """Catches a statistic or phase computed in bfloat16: our error may not exceed theirs much."""
    theirs32 = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    theirs16 = transformers.AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.bfloat16)
    ids = torch.randint(3, 512, (2, 256))
    with torch.no_grad():
        truth = theirs32(ids).logits
        ours = (load_model(stories260k, dtype=torch.bfloat16)(ids).float() - truth).abs().mean()
        eager = (theirs16(ids).logits.float() - truth).abs().mean()
    assert ours <= 1.1 * eager


def test_swiglu_has_the_gradients_of_its_definition() -> None:
    """Catches a wrong derivative, and a third wide tensor kept for the backward pass."""
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = swiglu(gate, up)
    assert len(kept) == 2
    torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
