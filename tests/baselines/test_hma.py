"""HMA's ratios, their gradient, and the two models that they mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.baselines.hma import HMA, block_of, ratios
from cfs.data.packing import micro_batches
from cfs.errors import UserError
from cfs.model import load_model, save_model
from cfs.train.loop import Run, train
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from tests.baselines.lockstep import lone_setting, lone_shard
from tests.conftest import tiny_model
from tests.train.cut import CutShard
from tests.train.runs import base_model, make_run, same, weights

NAMES = ["embed_tokens.weight", "layers.0.w", "layers.1.w", "layers.2.w", "norm.weight"]
BLOCKS = [0, 0, 0, 1, 1]
"""Of each of them where K is 2."""
LR = 0.1


def test_the_mean_of_the_ratios_is_alpha() -> None:
    """Catches ratios that drift away from the one number that the user asked for."""
    for scale in (0.0, 1.0, 30.0):
        logits = scale * torch.randn(7, dtype=torch.float64)
        found = ratios(logits, 0.3)
        assert float(found.mean()) == pytest.approx(0.3, rel=1e-12)
        assert torch.equal(found.argsort(), logits.argsort()) or scale == 0.0
        assert float(found.min() / found.max()) >= 0.2 / 1.2 - 1e-12, "by eps"


def test_ratios_by_hand() -> None:
    """Catches a softmax, eps left out, and K forgotten; sigmoid(ln 4) is 0.8 and of 0 is 0.5."""
    logits = torch.tensor([4.0, 1.0], dtype=torch.float64).log()
    expected = [0.6 * 2 * 1.0 / 1.7, 0.6 * 2 * 0.7 / 1.7]
    assert ratios(logits, 0.6).tolist() == pytest.approx(expected, rel=1e-12)


def test_blocks_by_hand() -> None:
    """Catches a parameter in no block, layers.10 read as layers.1, and runs of unlike length."""
    layers = [block_of(f"layers.{i}.mlp.up_proj.weight", 12, 3) for i in range(12)]
    assert layers == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    layers = [block_of(f"layers.{i}.input_layernorm.weight", 5, 3) for i in range(5)]
    assert layers == [0, 0, 1, 1, 2]
    ends = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
    assert [block_of(name, 5, 3) for name in ends] == [0, 2, 2]


@pytest.mark.parametrize("family", ["olmo", "llama"])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_blocks_cover_a_model(num_blocks: int, family: str) -> None:
    """Catches a block without parameters, whose ratio would take its share of alpha for nothing."""
    model = tiny_model(family, num_hidden_layers=4)
    found = [block_of(name, 4, num_blocks) for name, _ in model.named_parameters()]
    assert sorted(set(found)) == list(range(num_blocks))
    assert found == sorted(found), "in the model's order"


def begun(
    alpha: float, original: list[Tensor], tuned: list[Tensor], state: object = None
) -> tuple[HMA, list[CutShard]]:
    """Two blocks over `NAMES`; `state` as a checkpoint gives it back."""
    shards = [lone_shard(name, torch.zeros(4)) for name in NAMES]
    method = HMA(hma_alpha=alpha, hma_blocks=2, hma_lr=LR)
    method.check()
    if state is not None:
        method.set_state(json.loads(json.dumps(state)))
    method.begin(lone_setting(shards, original, [tuned]))
    return method, shards


def two_models() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(4, generator=generator) for _ in range(2 * len(NAMES))]
    return drawn[: len(NAMES)], drawn[len(NAMES) :]


def test_the_weights_are_the_mixture_of_each_block() -> None:
    """Catches alpha on the tuned model's side, and a block's ratio used on another."""
    original, tuned = two_models()
    state = {"logits": [0.0, float(torch.tensor(4.0).log())], "adam": {}}
    _, shards = begun(0.6, original, tuned, state)
    alphas = [0.6 * 2 * 0.7 / 1.7, 0.6 * 2 * 1.0 / 1.7]
    for shard, block, star, other in zip(shards, BLOCKS, original, tuned, strict=True):
        expected = alphas[block] * star + (1 - alphas[block]) * other
        torch.testing.assert_close(shard.local, expected)


def test_the_gradient_of_the_logits_is_the_chain_rules() -> None:
    """Catches theta_tuned - theta* in place of its negative, a mean over a block, and ratios whose
    common denominator is held fixed; autograd goes through the formula in float64."""
    original, tuned = two_models()
    start = [0.3, -0.8]
    method, shards = begun(0.4, original, tuned, {"logits": start, "adam": {}})
    centres = [torch.randn(4) for _ in NAMES]
    for shard, centre in zip(shards, centres, strict=True):
        shard.parameter.grad = shard.local - centre  # of half the squared distance
    assert method.before_step(0) == 0.0, "it has no penalty"
    assert torch.equal(method.logits.detach(), torch.tensor(start, dtype=torch.float64))
    method.after_step(0)
    logits = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    shares = logits.sigmoid() + 0.2
    alphas = 0.4 * 2 * shares / shares.sum()
    loss = torch.zeros((), dtype=torch.float64)
    for block, *tensors in zip(BLOCKS, original, tuned, centres, strict=True):
        star, other, centre = (tensor.double() for tensor in tensors)
        mixed = alphas[block] * star + (1 - alphas[block]) * other
        loss = loss + 0.5 * (mixed - centre).square().sum()
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(method.logits.grad, expected, rtol=1e-5, atol=1e-7)
    moved = method.logits.detach() - torch.tensor(start, dtype=torch.float64)
    torch.testing.assert_close(moved, -LR * expected.sign(), rtol=1e-6, atol=0.0)  # Adam's first
    assert all(shard.parameter.grad is None for shard in shards), "nothing is left to AdamW"


def other_model(place: Path) -> Path:
    """As far from the base as any other, so that finite differences are well above rounding."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    save_model(tiny_model("olmo", seed=8, **shape), place / "other")
    return place / "other"


def hma_run(place: Path, name: str, **changes: object) -> Run:
    tuned = [str(other_model(place))]
    flags = {"method": "hma", "l2": None, "hma_blocks": 2, "tuned": tuned, "steps": 3}
    return make_run(place, name, **(flags | changes))


def test_the_gradient_equals_finite_differences_of_a_models_loss(tmp_path: Path) -> None:
    """Catches a parameter left out of its block's inner product, the tied table taken twice, and a
    loss that is not the one that the run minimises."""
    run = hma_run(tmp_path, "run", hma_alpha=0.4)
    (method,) = run.methods
    assert isinstance(method, HMA)
    draws = run.mixture.batch(0)
    sources = SourceWeights.of(TargetCounts.of(draws), run.config.lam, run.config.normalize)
    batches = micro_batches(draws, run.config.micro_batch_tokens)

    def loss_at(logits: Tensor) -> float:
        with torch.no_grad():
            method.logits.copy_(logits)
            method.set_weights()
            terms = [micro_batch_loss(run.model, batch, sources) for batch in batches]
        return sum(float(term.loss) for term in terms)

    start = torch.tensor([0.3, -0.5], dtype=torch.float64)
    steps = 0.03 * torch.eye(2, dtype=torch.float64)
    expected = [(loss_at(start + h) - loss_at(start - h)) / 0.06 for h in steps]
    loss_at(start)
    for batch in batches:
        micro_batch_loss(run.model, batch, sources).loss.backward()
    method.before_step(0)
    method.after_step(0)
    assert method.logits.grad is not None
    assert method.logits.grad.tolist() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("alpha", "end"), [(0.0, "other"), (1.0, "base")])
def test_the_ends_of_the_line_are_the_two_models(alpha: float, end: str, tmp_path: Path) -> None:
    """Catches here + alpha (star - here), which rounds, and the two models mixed up."""
    run = hma_run(tmp_path, "run", hma_alpha=alpha)
    expected = load_model(tmp_path / end).named_parameters()
    assert same(weights(run), {name: value.detach() for name, value in expected})


def test_alpha_0_stays_the_tuned_model_whatever_trains(tmp_path: Path) -> None:
    """Catches an optimizer that moves weights beside the ratios: decay, or a gradient left."""
    run = hma_run(tmp_path, "run", hma_alpha=0.0)
    train(run)
    expected = load_model(tmp_path / "other").named_parameters()
    assert same(weights(run), {name: value.detach() for name, value in expected})
    assert set(run.optimizer.state_facts()["num_updates"].values()) == {0}


def test_training_moves_the_ratios_alone(tmp_path: Path) -> None:
    """Catches weights mixed before the last update of the ratios, or moved by anything else."""
    run = hma_run(tmp_path, "run", hma_lr=0.3, steps=6)
    (method,) = run.methods
    assert isinstance(method, HMA)
    train(run)
    assert method.logits.detach().abs().min() > 0.1
    alphas = ratios(method.logits.detach(), 0.5)
    base = dict(load_model(base_model(tmp_path)).named_parameters())
    other = dict(load_model(tmp_path / "other").named_parameters())
    for name, value in weights(run).items():
        alpha = float(alphas[block_of(name, 2, 2)])
        expected = alpha * base[name].detach() + (1 - alpha) * other[name].detach()
        torch.testing.assert_close(value, expected)


def test_a_state_goes_on_as_if_never_saved() -> None:
    """Catches Adam's moments or its count of steps begun anew, and logits rounded on the way."""
    original, tuned = two_models()
    grads = [[torch.randn(4) for _ in NAMES] for _ in range(6)]

    def steps(method: HMA, shards: list[CutShard], part: range) -> None:
        for step in part:
            for shard, grad in zip(shards, grads[step], strict=True):
                shard.parameter.grad = grad.clone()
            method.before_step(step)
            method.after_step(step)

    whole, whole_shards = begun(0.5, original, tuned)
    steps(whole, whole_shards, range(6))
    first, first_shards = begun(0.5, original, tuned)
    steps(first, first_shards, range(3))
    second, second_shards = begun(0.5, original, tuned, first.state())
    for one, other in zip(first_shards, second_shards, strict=True):
        assert torch.equal(one.local, other.local), "begin() sets the weights"
    steps(second, second_shards, range(3, 6))
    assert torch.equal(second.logits, whole.logits)
    assert second.state() == whole.state()
    for one, other in zip(whole_shards, second_shards, strict=True):
        assert torch.equal(one.local, other.local)


def test_a_state_before_the_first_step_is_one_too() -> None:
    """Catches Adam's absent moments being written, or asked for."""
    original, tuned = two_models()
    method, _ = begun(0.5, original, tuned)
    again, _ = begun(0.5, original, tuned, method.state())
    assert again.logits.tolist() == [0.0, 0.0]


def test_more_blocks_than_layers_are_refused() -> None:
    """Catches a block without layers."""
    original, tuned = two_models()
    shards = [lone_shard(name, torch.zeros(4)) for name in NAMES]
    with pytest.raises(UserError, match="--hma-blocks 4: expected at most 3"):
        HMA(hma_blocks=4).begin(lone_setting(shards, original, [tuned]))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"hma_alpha": -0.1}, "--hma-alpha"),
        ({"hma_alpha": 1.1}, "--hma-alpha"),
        ({"hma_blocks": 0}, "--hma-blocks"),
        ({"hma_lr": 0.0}, "--hma-lr"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], flag: str) -> None:
    """Catches a mixture that is none, and ratios that cannot train."""
    with pytest.raises(UserError, match=flag):
        HMA(**options).check()  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    """Catches ratios and weights that are lost to NaN before the loop can refuse the step."""
    original, tuned = two_models()
    method, shards = begun(0.4, original, tuned)
    before = [shard.local.clone() for shard in shards]
    for shard in shards:
        shard.parameter.grad = torch.full_like(shard.local, torch.nan)
    penalty = method.before_step(0)
    assert penalty is not None
    assert penalty.isnan(), "the loop refuses a loss with this in it"
    assert all(torch.equal(s.local, b) for s, b in zip(shards, before, strict=True))
    assert method.logits.tolist() == [0.0, 0.0]
