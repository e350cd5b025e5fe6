"""LoRA: its layer, its start, what it merges to, and the files that PEFT reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from cfs.baselines.lora import Lora, LoraLinear, init_adapters, merged_parameters
from cfs.baselines.lora_adapter import ADAPTERS
from cfs.errors import UserError
from cfs.model import Decoder, load_model, save_model
from cfs.model.saving import save_tensors
from cfs.train.parallel import Checkpointing, checkpoint_activations, local_shards, shard_rows
from tests.baselines.lora_ranks import LORA, STEPS, take_steps, wrapped
from tests.conftest import ALONE, run_python, tiny_model
from tests.train.cut import CutShard

IDS = torch.randint(1, 97, (3, 40), generator=torch.Generator().manual_seed(5))
SCALED = Lora(lora_rank=4, lora_alpha=6.0)
FAMILIES = {
    "olmo": {"clip_qkv": 1.5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2},
}
"""Both ways of the head, grouped heads, and clipping, which comes after the update."""


def adapted(family: str = "olmo", lora: Lora = SCALED, *, is_random: bool = True) -> Decoder:
    """A wrapped tiny model; random: with updates that show in the logits."""
    model = tiny_model(family, **FAMILIES[family])
    lora.wrap(model)
    init_adapters(local_shards(model), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_random and name.endswith(ADAPTERS):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_is_the_identity(family: str) -> None:
    """Catches B drawn at random, and a product other than the base's, by a single bit."""
    base = tiny_model(family, **FAMILIES[family])
    model = adapted(family, is_random=False)
    assert torch.equal(model(IDS), base(IDS))
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("lora_A"))
    merged = dict(merged_parameters(model.named_parameters(), SCALED.scale))
    assert all(torch.equal(merged[name], p) for name, p in base.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_formulas_and_reaches_the_updates_alone(family: str) -> None:
    """Catches a weight, norm or table that trains too, a swapped A and B, and a wrong scale."""
    model = adapted(family)
    pull = torch.randn(3, 40, 97)
    (model(IDS) * pull).sum().backward()
    updates = {
        name: p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
        if name.endswith(ADAPTERS)
    }
    base = tiny_model(family, **FAMILIES[family]).requires_grad_(False)
    weights = dict(base.named_parameters())
    for name in [name for name in updates if name.endswith("lora_A")]:
        module = name.removesuffix(".lora_A")
        product = updates[f"{module}.lora_B"] @ updates[f"{module}.lora_A"]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + 6.0 / 4 * product  # type: ignore[assignment]
    (functional_call(base, weights, (IDS,)) * pull).sum().backward()  # type: ignore[arg-type]
    assert len(updates) == 2 * 7 * 2, "two layers of seven projections"
    for name, parameter in model.named_parameters():
        if name in updates:
            expected, grad = updates[name].grad, parameter.grad
            assert expected is not None
            assert grad is not None
            assert (grad - expected).norm() <= 1e-5 * expected.norm(), name
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str, tmp_path: Path) -> None:
    """Catches a merge that leaves a module out, and names or an order that saving cannot take."""
    base = tiny_model(family, **FAMILIES[family])
    model = adapted(family)
    merged = merged_parameters(model.named_parameters(), SCALED.scale)
    save_tensors(model.config, merged, tmp_path / "merged", None, torch.float32)
    names = [name for name, _ in merged_parameters(model.named_parameters(), SCALED.scale)]
    assert names == [name for name, _ in base.named_parameters()]
    logits = model(IDS)
    assert largest_difference(logits, base(IDS)) > 0.1
    assert largest_difference(load_model(tmp_path / "merged")(IDS), logits) <= 1e-5


def test_merge_rounds_once() -> None:
    """Catches a product in bfloat16, or a merged weight rounded before it is written."""
    w, a, b = torch.randn(8, 6), torch.randn(3, 6), torch.randn(8, 3)
    named = [("x.lora_A", a), ("x.lora_B", b), ("x.weight", w)]
    halves = [(name, value.bfloat16()) for name, value in named]
    ((name, merged),) = merged_parameters(halves, 0.5)
    a, b, w = (value.float() for _, value in halves)
    assert name == "x.weight"
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, w + 0.5 * b @ a, rtol=1e-6, atol=1e-6)


def test_merge_wants_adapters_before_their_weight() -> None:
    """Catches weights that go out unmerged, silently, where parameters come in another order."""
    named = [("x.weight", torch.ones(2, 2)), ("x.lora_A", torch.ones(1, 2))]
    with pytest.raises(AssertionError, match=r"x\.lora_A"):
        list(merged_parameters(named, 1.0))


def test_rank_and_alpha_scale_the_update() -> None:
    """Catches a default alpha that is no longer the rank, and alpha taken for the scale itself."""
    assert Lora().lora_rank == Lora().alpha == 64
    assert Lora(lora_rank=256).scale == 1.0
    x, linear = torch.randn(5, 6), nn.Linear(6, 8, bias=False)
    rank_one = LoraLinear(linear, 1, Lora(lora_rank=1, lora_alpha=3.0).scale)
    nn.init.ones_(rank_one.lora_A)
    nn.init.ones_(rank_one.lora_B)
    expected = linear(x) + 3.0 * x.sum(-1, keepdim=True)
    torch.testing.assert_close(rank_one(x), expected)
    half = LoraLinear(linear, 2, Lora(lora_rank=2, lora_alpha=3.0).scale)
    nn.init.ones_(half.lora_A)
    nn.init.ones_(half.lora_B)
    torch.testing.assert_close(half(x), expected)  # twice the rank, half the scale


def start_values(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """A and B of two projections as `count` ranks fill them, put together."""
    shapes = {"layers.0.q_proj.lora_A": (5, 64), "layers.1.q_proj.lora_A": (5, 64)}
    shapes["layers.1.q_proj.lora_B"] = (9, 5)
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for index in range(count):
        for name, shape in shapes.items():
            rows = shard_rows(shape[0], index, count)
            held = nn.Parameter(torch.full((rows.stop - rows.start, shape[1]), torch.nan).to(dtype))
            init_adapters([CutShard(name, held, torch.Size(shape), index, count)], seed)
            parts[name].append(held.detach())
    return {name: torch.cat(values) for name, values in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_ranks_starts_alike(dtype: torch.dtype) -> None:
    """Catches values that depend on the ranks, and A's alike over modules or seeds.

    Of 4 ranks the last has no row of A, of 3 an uneven share.
    """
    whole = start_values(1, dtype=dtype)
    for count in (2, 3, 4):
        parts = start_values(count, dtype=dtype)
        assert all(torch.equal(parts[name], value) for name, value in whole.items())
    first, second, b = whole.values()
    assert not torch.equal(first, second)
    assert not torch.equal(first, start_values(1, seed=1, dtype=dtype)["layers.0.q_proj.lora_A"])
    assert not b.any()
    assert 0.9 / 8 < first.abs().max() <= 1 / 8, "uniform on +-1/sqrt(in)"
    assert first.float().std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_equal_logits(family: str, tmp_path: Path) -> None:
    """Catches names, a scale or targets that PEFT would skip or take otherwise."""
    save_model(tiny_model(family, **FAMILIES[family]), tmp_path / "base")
    lora = replace(SCALED, lora_targets="q_proj, v_proj,down_proj")
    model = adapted(family, lora)
    lora.write_more(model.named_parameters(), tmp_path, str(tmp_path / "base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    base_logits = theirs(IDS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert largest_difference(theirs(IDS).logits, base_logits) > 0.1
    assert largest_difference(model(IDS), theirs(IDS).logits) <= 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_peft_saves_what_we_save(tmp_path: Path) -> None:
    """Catches a tensor that PEFT has under another name and, not strict, fills with its own."""
    save_model(tiny_model("llama"), tmp_path / "base")
    model = tiny_model("llama")
    SCALED.wrap(model)
    init_adapters(local_shards(model), seed=0)
    SCALED.write_more(model.named_parameters(), tmp_path, str(tmp_path / "base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).save_pretrained(
        str(tmp_path / "theirs")
    )
    ours, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "theirs")
    )
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("targets", ["q_proj,query", "lm_head", "embed_tokens", "", "q_proj,"])
def test_unknown_target(targets: str) -> None:
    """Catches a misspelt name that adapts nothing, and a head whose update would have no effect."""
    model = tiny_model()
    with pytest.raises(UserError, match=f"--lora-targets {targets}: .*down_proj.*or all-linear"):
        Lora(lora_rank=4, lora_targets=targets).wrap(model)
    assert all(p.requires_grad for p in model.parameters()), "refused, and left as it was"


@pytest.mark.parametrize("targets", [Lora().lora_targets, "all-linear", " k_proj , up_proj"])
def test_targets(targets: str) -> None:
    """Catches all-linear that takes the head, or a target that is left out."""
    model = tiny_model()
    Lora(lora_rank=4, lora_targets=targets).wrap(model)
    wrapped_names = {n for n, module in model.named_modules() if isinstance(module, LoraLinear)}
    names = ["self_attn.k_proj", "mlp.up_proj"]
    if "k_proj ," not in targets:
        names += ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"]
        names += ["mlp.gate_proj", "mlp.down_proj"]
    assert wrapped_names == {f"layers.{i}.{name}" for i in range(2) for name in names}


@pytest.mark.parametrize(
    "options",
    [{"lora_rank": 0}, {"lora_alpha": 0.0}, {"lora_alpha": float("nan")}, {"lora_alpha": -1.0}],
)
def test_bad_values(options: dict[str, float]) -> None:
    """Catches updates of no rank, and a scale at which they have no effect or no value."""
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')} "):
        Lora(**options).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["selective", "block"])
def test_checkpointed_activations(kind: Checkpointing) -> None:
    """Catches a repeated forward pass that meets the projections of before the wrapping."""
    plain, other = tiny_model(), tiny_model()
    checkpoint_activations(other, kind)
    for model in (plain, other):
        SCALED.wrap(model)
        init_adapters(local_shards(model), seed=0)
        for name, parameter in model.named_parameters():
            if name.endswith(".lora_B"):
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        model(IDS).square().sum().backward()
    for (name, ours), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not name.endswith(ADAPTERS))
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name  # type: ignore[arg-type]


def test_two_ranks(tmp_path: Path) -> None:
    """Catches frozen and trained weights that FSDP cannot hold in one group, updates that it
    loses, and parameters that it gathers in another order.
    """
    base = tmp_path / "base"
    save_model(tiny_model("llama", tie_word_embeddings=True), base)
    arguments = ("-m", "tests.baselines.lora_ranks", str(base), str(tmp_path / "two"))
    done = run_python(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two")
    alone = take_steps(wrapped(base, ALONE, "none"), ALONE)
    start = dict(load_model(base).named_parameters())
    assert alone.keys() == two.keys() == start.keys()
    for name, value in alone.items():
        moved = largest_difference(value, start[name])
        assert largest_difference(two[name], value) <= 1e-4 * moved, name
        assert (moved > 0.01) == ("_proj." in name), (name, moved, STEPS, LORA)
