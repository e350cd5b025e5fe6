"""One batch, one gradient: however it is cut, packed, dealt out, checkpointed or chunked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import micro_batches, packed_batch, padded_batch
from cfs.model import Decoder, logprobs
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from cfs.train.parallel import checkpoint_activations, compile_blocks
from tests.conftest import run_python, tiny_model
from tests.train.gradients import (
    CUTS,
    KINDS,
    LAM,
    Normalize,
    batch_of_eight,
    batch_of_seven,
    gradients,
    plain_gradients,
    relative_difference,
    worst_difference,
)

EQUAL = 1e-6
"""Norm of a parameter's gradient error over the gradient's norm, in float32."""


def model_of(tied: bool = False) -> Decoder:
    return tiny_model("llama", tie_word_embeddings=tied)


@pytest.mark.parametrize("normalize", ["pooled", "source"])
@pytest.mark.parametrize("cut", CUTS)
def test_gradients_equal_the_plain_objective(normalize: Normalize, cut: int) -> None:
    """Catches means of means, documents that see their neighbours, and a term lost by cutting."""
    draws = batch_of_eight()
    ours = gradients(model_of(), draws, micro_batches(draws, cut), normalize)
    assert relative_difference(ours, plain_gradients(model_of(), draws, normalize)) < EQUAL


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind: str, tied: bool) -> None:
    """Catches an attention context that serves a block once only."""
    draws = batch_of_eight()
    model = model_of(tied)
    checkpoint_activations(model, kind)  # type: ignore[arg-type]
    ours = gradients(model, draws, micro_batches(draws, 30))
    assert relative_difference(ours, plain_gradients(model_of(tied), draws)) < EQUAL


@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_padded(tied: bool) -> None:
    """Catches positions that run on, and targets shifted over the border of two documents."""
    draws, ids = batch_of_eight(), list(range(8))
    packed = gradients(model_of(tied), draws, [packed_batch(draws, ids)])
    padded = gradients(model_of(tied), draws, [padded_batch(draws, ids)])
    assert relative_difference(packed, padded) < EQUAL


def test_order_within_a_batch_changes_no_gradient() -> None:
    """Catches a document whose place in the row matters."""
    draws = batch_of_eight()
    orders = (list(range(8)), [6, 2, 7, 0, 4, 1, 5, 3])
    one, other = (gradients(model_of(), draws, [packed_batch(draws, ids)]) for ids in orders)
    assert relative_difference(one, other) < EQUAL
    shuffled = [draws[i] for i in orders[1]]
    other = gradients(model_of(), shuffled, micro_batches(shuffled, 30))
    assert relative_difference(one, other) < EQUAL


@pytest.mark.parametrize("rows", [1, 7])
def test_chunks_of_the_head_change_no_gradient(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a chunk's share of the vocabulary's gradient lost or doubled."""
    draws = batch_of_eight()
    whole = gradients(model_of(), draws, micro_batches(draws, 10_000))
    monkeypatch.setattr(logprobs, "rows_of_chunk", lambda weight: rows)
    chunked = gradients(model_of(), draws, micro_batches(draws, 10_000))
    assert relative_difference(chunked, whole) < EQUAL


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.0])
def test_the_head_meets_the_gradient_that_it_was_promised(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hint that is off by a rounding, which would cost the head a second pass."""
    draws = batch_of_eight()
    passes: list[int] = []
    head = logprobs._head

    def counted(*arguments: object) -> object:
        passes.append(1)
        return head(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(logprobs, "_head", counted)
    weights = SourceWeights.of(TargetCounts.of(draws), LAM, "source")
    batch = packed_batch(draws, list(range(8)))
    loss = micro_batch_loss(model_of(), batch, weights, scale).loss
    loss.backward()
    assert len(passes) == 1
    loss = micro_batch_loss(model_of(), batch, weights, scale).loss
    (loss * 3).backward()
    assert len(passes) == 3, "another gradient than promised is computed, not guessed"


def test_a_scaled_loss_is_the_loss_times_its_scale() -> None:
    """Catches ranks whose number changes the step."""
    draws = batch_of_eight()
    weights = SourceWeights.of(TargetCounts.of(draws), LAM, "pooled")
    batch = packed_batch(draws, list(range(8)))
    one, *sums = micro_batch_loss(model_of(), batch, weights)
    four, *same_sums = micro_batch_loss(model_of(), batch, weights, scale=4)
    assert four.item() == 4 * one.item()
    assert sums == same_sums, "sums of nats are not scaled"
    nll_task, nll_synthetic, _ = (float(x) for x in sums)
    expected = weights.task * nll_task + weights.synthetic * nll_synthetic
    assert one.item() == pytest.approx(expected, rel=1e-6)


def test_compiled_blocks_have_the_same_gradient() -> None:
    """Catches a compiled block that keeps the lengths of the first batch."""
    draws, start = batch_of_eight(), model_of().state_dict()
    expected = plain_gradients(model_of(), draws)
    model = model_of()
    compile_blocks(model)
    for cut in (10_000, 30):
        model.load_state_dict(start)
        ours = gradients(model, draws, micro_batches(draws, cut))
        assert relative_difference(ours, expected) < EQUAL


@pytest.mark.parametrize("tied", [False, True])
def test_no_parameter_is_further_from_float64_than_the_plain_way_is(tied: bool) -> None:
    """Catches one small parameter whose error the norm over all of them hides."""
    draws = batch_of_eight()
    truth = plain_gradients(model_of(tied).double(), draws)
    allowed = 1.1 * worst_difference(plain_gradients(model_of(tied), draws), truth)
    ours = gradients(model_of(tied), draws, micro_batches(draws, 30))
    assert worst_difference(ours, truth) < allowed


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_together_equal_one(num_ranks: int, tmp_path: Path) -> None:
    """Catches a loss scale that depends on the number of ranks or their unequal shares."""
    file = tmp_path / "gradients.pt"
    done = run_python("-m", "tests.train.gradients", str(file), ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    cases = torch.load(file, weights_only=True)
    assert len(cases) == 2 * len(KINDS) * len(CUTS)
    plain = {tied: plain_gradients(model_of(tied), batch_of_seven()) for tied in (False, True)}
    worst = {case: relative_difference(ours, plain[case[0]]) for case, ours in cases.items()}
    print(f"\n{num_ranks} ranks: gradients differ by at most {max(worst.values()):.1e}")
    assert max(worst.values()) < EQUAL, worst


def test_prompt_tokens_get_exactly_zero_gradient() -> None:
    """Catches a mask shifted by one: a logit at a masked target must not move the loss at all."""
    model = tiny_model()
    batch = packed_batch([Draw(make_example([0, 5, 6, 7, 8, 9], first_target=4), False)], [0])
    captured: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    model.norm.register_forward_hook(keep)
    loss = micro_batch_loss(model, batch, SourceWeights(0.5, 0.5)).loss
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
    loss, task, synthetic, _ = micro_batch_loss(
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
        weights = SourceWeights.of(TargetCounts.of(draws), 1, "pooled")
        loss = micro_batch_loss(model, packed_batch(draws, [0, 1, 2, 3]), weights).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        p = model(torch.tensor([[0, 5, 6, 7]])).softmax(-1)
    assert p[0, 3, 0] > 0.95, "end-of-text follows the last word"
    assert p[0, 0, 5] > 0.95, "and the seed token, though it is the same id, starts the text"


def test_an_examples_weight_multiplies_its_loss_and_no_count() -> None:
    """Catches weights that move with packing, weigh the counts too, or reach other examples."""
    plain = batch_of_eight()
    chosen = [0.25 + 0.5 * i for i in range(len(plain))]
    draws = [replace(draw, weight=w) for draw, w in zip(plain, chosen, strict=True)]
    weights = SourceWeights.of(TargetCounts.of(plain), LAM, "pooled")
    assert TargetCounts.of(draws) == TargetCounts.of(plain)
    expected = sum(
        w * micro_batch_loss(model_of(), packed_batch([draw], [0]), weights).loss.item()
        for draw, w in zip(plain, chosen, strict=True)
    )
    for batch in (
        packed_batch(draws, [5, 0, 7, 1, 2, 6, 3, 4]),
        padded_batch(draws, list(range(8))),
    ):
        found = micro_batch_loss(model_of(), batch, weights)
        assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    unweighted = micro_batch_loss(model_of(), packed_batch(plain, list(range(8))), weights)
    assert found.nll_task.item() == pytest.approx(unweighted.nll_task.item(), rel=1e-5)
