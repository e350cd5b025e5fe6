"""What stays and what moves, by the names of parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cfs.baselines.freeze import PARTS, Freeze, is_frozen
from cfs.errors import UserError
from cfs.model import load_model, save_model
from cfs.train.loop import train
from tests.conftest import read_metrics, tiny_model
from tests.train.runs import base_model, make_run, weights


def frozen_names(freeze: str, family: str = "llama", **changes: object) -> set[str]:
    model = tiny_model(family, **changes)
    method = Freeze(freeze=freeze)
    method.check()
    method.wrap(model)
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_parts_by_hand() -> None:
    """Catches a part that reaches into another, or misses some of its own names."""
    attention = {f"layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qkvo"}
    mlp = {f"layers.{i}.mlp.{x}_proj.weight" for i in (0, 1) for x in ("gate", "up", "down")}
    norms = {
        f"layers.{i}.{x}_layernorm.weight" for i in (0, 1) for x in ("input", "post_attention")
    }
    norms |= {"norm.weight"}
    assert frozen_names("embeddings") == {"embed_tokens.weight"}
    assert frozen_names("head") == {"lm_head.weight"}
    assert frozen_names("attention") == attention
    assert frozen_names("mlp") == mlp
    assert frozen_names("norms") == norms
    assert frozen_names("norms,attention") == norms | attention


@pytest.mark.parametrize("family", ["olmo", "llama"])
def test_each_parameter_is_of_one_part(family: str) -> None:
    """Catches a parameter that no name of a part can freeze."""
    for name, _ in tiny_model(family).named_parameters():
        assert sum(is_frozen(name, part) for part in PARTS) == 1, name


def test_layers_go_by_whole_numbers() -> None:
    """Catches a range without its last layer, and layers.1 frozen together with layers.10."""
    frozen = frozen_names("layers:1-2", num_hidden_layers=12)
    assert {name.split(".")[1] for name in frozen} == {"1", "2"}
    first = frozen_names("layers:0-0")
    model = tiny_model("llama")
    assert first == {name for name, _ in model.named_parameters() if name.startswith("layers.0.")}


def test_a_tied_head_stays_with_the_embeddings() -> None:
    """Catches a head that goes on training the very table that was to stay."""
    model = tiny_model("olmo", tie_word_embeddings=True)
    Freeze(freeze="embeddings").wrap(model)
    ids = torch.tensor([[0, 5, 7, 9]])
    model(ids, target_mask=ids > 0).sum().backward()
    assert model.head_weight is model.embed_tokens.weight
    assert model.embed_tokens.weight.grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "layers" in n)
    with pytest.raises(UserError, match="--freeze head: the model has no parameter of it"):
        frozen_names("head", tie_word_embeddings=True)


def test_a_head_of_its_own_trains_beside_frozen_embeddings() -> None:
    """Catches a head frozen by its shape or by the table's name."""
    assert "lm_head.weight" not in frozen_names("embeddings")


@pytest.mark.parametrize(
    ("optimizer", "masters"), [("adamw", "float32"), ("adamw8bit", "bfloat16")]
)
def test_frozen_weights_do_not_move_a_bit(optimizer: str, masters: str, tmp_path: Path) -> None:
    """Catches weight decay or a rounding that reaches what is frozen, and memory held for it."""
    changes = {"freeze": "embeddings,layers:0-0", "l2": None, "steps": 3, "lr": 1e-2}
    changes |= {"optimizer": optimizer, "masters": masters, "dtype": masters}
    run = make_run(tmp_path, "run", method="freeze", **changes)
    base = dict(load_model(base_model(tmp_path), getattr(torch, masters)).named_parameters())
    train(run)
    moved = {name for name, value in weights(run).items() if not torch.equal(value, base[name])}
    assert moved == {name for name in base if name.startswith("layers.1.")}
    held = run.optimizer.state_tensors()
    assert {name.partition("layers.")[2][:2] for name in held} == {"1."}
    assert {shard.name for shard in run.shards} == moved


def test_the_gradient_norm_is_of_what_trains(tmp_path: Path) -> None:
    """Catches gradients of frozen weights in the norm that is clipped, and other gradients for
    what trains; the two freezing runs share the model between them."""
    squares = {}
    for freeze in (None, "embeddings,layers:0-0", "layers:1-1"):
        method = "ft" if freeze is None else "freeze"
        train(make_run(tmp_path, f"{freeze}", method=method, l2=None, steps=1, freeze=freeze))
        squares[freeze] = read_metrics(tmp_path / f"{freeze}")[1]["grad_norm"] ** 2
    whole = squares.pop(None)
    assert sum(squares.values()) == pytest.approx(whole, rel=1e-5)
    assert max(squares.values()) < 0.95 * whole


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("embedding", "--freeze embedding: expected embeddings, head"),
        ("mlp,", "--freeze : expected embeddings, head"),
        ("layers:1", "--freeze layers:1: expected .* layers:FIRST-LAST"),
        ("mlp,layers:a-b", "--freeze layers:a-b: expected"),
        ("layers:2-3", "--freeze layers:2-3: the model has no parameter of it"),
        ("layers:1-0", "--freeze layers:1-0: expected"),
        ("norms", "--freeze norms: the model has no parameter of it"),  # OLMo's have no gain
        ("embeddings,head,layers:0-1", "--freeze .*: nothing is left to train"),
        ("embeddings,head,attention,mlp", "--freeze .*: nothing is left to train"),
    ],
)
def test_what_freezes_nothing_or_everything_is_refused(freeze: str, message: str) -> None:
    """Catches a misspelt part that leaves all weights to train, in silence."""
    with pytest.raises(UserError, match=message):
        frozen_names(freeze, "olmo")


def test_the_result_holds_the_frozen_weights_too(tmp_path: Path) -> None:
    """Catches a model written, or a checkpoint resumed, without what did not train."""
    flags = {"l2": None, "steps": 3, "freeze": "attention"}
    whole = make_run(tmp_path, "whole", method="freeze", **flags)
    train(whole)
    assert not train(make_run(tmp_path, "cut", method="freeze", stop_after=2, **flags))
    resumed = make_run(tmp_path, "cut", method="freeze", **flags)
    train(resumed)
    save_model(resumed.model, tmp_path / "model")
    loaded = dict(load_model(tmp_path / "model").named_parameters())
    for name, value in weights(whole).items():
        assert torch.equal(loaded[name], value), name
