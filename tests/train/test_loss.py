"""One batch, one gradient: however it is cut, dealt out or padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import micro_batches, packed_batch, padded_batch
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.parallel import Checkpointing, checkpoint_activations, compile_blocks
from tests.conftest import run_python, tiny_model
from tests.train.gradients import (
    CUTS,
    KINDS,
    Normalize,
    batch_of_eight,
    gradients,
    plain_gradients,
    relative_difference,
    worst_difference,
)

EXACT = 1e-6
"""Largest relative difference between gradients that are equal but for float32 rounding."""


@pytest.fixture(scope="module")
def plain() -> dict[bool, dict[str, Tensor]]:
    """The oracle's gradients by whether the table is tied to the head."""
    return {
        tied: plain_gradients(tiny_model("llama", tie_word_embeddings=tied), batch_of_eight())
        for tied in (False, True)
    }


@pytest.mark.parametrize("normalize", ["pooled", "source"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_packed_micro_batches_have_the_gradient_of_the_plain_objective(
    tied: bool, cut: int, normalize: Normalize
) -> None:
    """Catches means of means, either term lost in accumulation, documents that see each other."""
    draws = batch_of_eight()
    model, oracle = (tiny_model("llama", tie_word_embeddings=tied) for _ in range(2))
    ours = gradients(model, draws, micro_batches(draws, cut), normalize)
    assert relative_difference(ours, plain_gradients(oracle, draws, normalize)) < EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_no_parameter_is_further_from_float64_than_the_plain_way_is(tied: bool) -> None:
    """Catches one small parameter whose error the norm over all of them hides."""
    draws = batch_of_eight()
    ours, plain, exact = (tiny_model("llama", tie_word_embeddings=tied) for _ in range(3))
    truth = plain_gradients(exact.double(), draws)
    allowed = 1.1 * worst_difference(plain_gradients(plain, draws), truth)
    assert worst_difference(gradients(ours, draws, micro_batches(draws, 30)), truth) < allowed


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_order_padding_and_packing_change_no_gradient(family: str) -> None:
    """Catches a position that counts from the row's start, and a mask of another document."""
    draws = batch_of_eight()
    expected = plain_gradients(tiny_model(family, num_key_value_heads=2), draws)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    for batches in (
        [packed_batch(draws, order)],
        [packed_batch(draws, order[:3]), packed_batch(draws, order[3:])],
        [padded_batch(draws, order)],
        [padded_batch(draws, [i]) for i in order],
    ):
        ours = gradients(tiny_model(family, num_key_value_heads=2), draws, batches)
        assert relative_difference(ours, expected) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(
    kind: Checkpointing, plain: dict[bool, dict[str, Tensor]]
) -> None:
    """Catches a block that is repeated with other positions, or a result that is not kept."""
    model, draws = tiny_model("llama", tie_word_embeddings=False), batch_of_eight()
    checkpoint_activations(model, kind)
    ours = gradients(model, draws, micro_batches(draws, 30))
    assert relative_difference(ours, plain[False]) < EXACT


def test_compiled_blocks_have_the_same_gradient(plain: dict[bool, dict[str, Tensor]]) -> None:
    """Catches a compiled block that keeps the lengths of the first batch."""
    model, draws = tiny_model("llama", tie_word_embeddings=False), batch_of_eight()
    compile_blocks(model)
    for cut in (10_000, 30):
        ours = gradients(model, draws, micro_batches(draws, cut))
        assert relative_difference(ours, plain[False]) < EXACT
        model.load_state_dict(tiny_model("llama", tie_word_embeddings=False).state_dict())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_one_gradient(
    num_ranks: int, plain: dict[bool, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Catches a loss scale that depends on the number of ranks or their unequal shares."""
    file = tmp_path / "gradients.pt"
    done = run_python("-m", "tests.train.gradients", str(file), ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    cases = torch.load(file, weights_only=True)
    assert len(cases) == 2 * len(KINDS) * len(CUTS)
    for (tied, kind, cut), ours in cases.items():
        assert relative_difference(ours, plain[tied]) < EXACT, (tied, kind, cut)


def test_prompt_tokens_get_exactly_zero_gradient() -> None:
    """Catches a mask shifted by one: a logit at a masked target must not move the loss at all."""
    model = tiny_model()
    batch = packed_batch([Draw(make_example([0, 5, 6, 7, 8, 9], first_target=4), False)], [0])
    captured: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    model.norm.register_forward_hook(keep)
    loss, _, _ = micro_batch_loss(model, batch, SourceWeights(0.5, 0.5))
    loss.backward()
    grad = captured[0].grad
    assert grad is not None
    used = grad[0].abs().sum(-1) > 0
    assert used.tolist() == [False, False, False, True, True, False]


def test_an_empty_micro_batch_adds_exactly_nothing() -> None:
    """Catches NaN or a count from a batch without targets."""
    model = tiny_model()
    draws = [Draw(make_example([0, 5, 6], first_target=3), False)]
    assert draws[0].example.num_targets == 0
    loss, task, synthetic = micro_batch_loss(
        model, packed_batch(draws, [0]), SourceWeights(1.0, 1.0)
    )
    loss.backward()
    assert loss.item() == task.item() == synthetic.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_weights_of_the_sources() -> None:
    """Catches a lambda that acts on the wrong term or an off denominator."""
    counts = TargetCounts(task=30, synthetic=10)
    assert SourceWeights.of(counts, 2.0, "pooled") == SourceWeights(1 / 40, 2 / 40)
    assert SourceWeights.of(counts, 2.0, "source") == SourceWeights(1 / 30, 2 / 10)
    only_task = TargetCounts(task=30, synthetic=0)
    assert SourceWeights.of(only_task, 2.0, "source").task == 1 / 30
    assert SourceWeights.of(TargetCounts(0, 0), 1.0, "pooled").task == 1.0


def test_counts_span_the_whole_batch() -> None:
    """Catches denominators of one micro-batch or one rank."""
    draws = batch_of_eight()
    counts = TargetCounts.of(draws)
    batches = [b for r in range(2) for b in micro_batches(draws, 20, r, 2)]
    assert counts.task + counts.synthetic == sum(int(b.target_mask.sum()) for b in batches)
    assert counts.synthetic == sum(int(b.synthetic.sum()) for b in batches)


def test_end_of_text_is_learned() -> None:
    """Catches a model that never stops: after training it ends where the data end."""
    model = tiny_model()
    draws = [Draw(make_example([0, 5, 6, 7, 0], 1), False)] * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _, _ = micro_batch_loss(
            model,
            packed_batch(draws, [0, 1, 2, 3]),
            SourceWeights.of(TargetCounts.of(draws), 1, "pooled"),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        p = model(torch.tensor([[0, 5, 6, 7]])).softmax(-1)
    assert p[0, 3, 0] > 0.95, "end-of-text follows the last word"
    assert p[0, 0, 5] > 0.95, "and the seed token, though it is the same id, starts the text"
