"""One batch, one gradient: however it is cut, dealt out or padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.data.formats import make_example
from cfs.data.mixture import Draw
from cfs.data.packing import collate, micro_batches
from cfs.model import Decoder
from cfs.train.loss import SourceWeights, TargetCounts, micro_batch_loss
from tests.conftest import run_python, tiny_model
from tests.train.gradients import batch_of_eight, gradients


def plain_loss(model: Decoder, draws: list[Draw], lam: float, normalize: str) -> Tensor:
    """The oracle: the objective written over single examples and full logits."""
    sums, counts = {True: torch.zeros(()), False: torch.zeros(())}, {True: 0, False: 0}
    for draw in draws:
        ids = torch.from_numpy(draw.example.input_ids)
        logprobs = model(ids[None])[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if draw.example.target_mask[t]:
                sums[draw.synthetic] = sums[draw.synthetic] - logprobs[t - 1, ids[t]]
                counts[draw.synthetic] += 1
    if normalize == "pooled":
        return (sums[False] + lam * sums[True]) / (counts[False] + counts[True])
    return sums[False] / counts[False] + lam * sums[True] / counts[True]


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in ours)


@pytest.mark.parametrize("normalize", ["pooled", "source"])
@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_gradients_equal_the_plain_objective(normalize: str, max_tokens: int) -> None:
    """Catches means of means, and either term lost in accumulation: 8x1, cut unevenly, 1x8."""
    draws = batch_of_eight()
    ours = gradients(tiny_model("llama"), draws, max_tokens, lam=0.7, normalize=normalize)
    model = tiny_model("llama")
    plain_loss(model, draws, 0.7, normalize).backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(ours, theirs) < 1e-5


def test_two_ranks_of_four_equal_one_of_eight(tmp_path: Path) -> None:
    """Catches a loss scale that depends on the number of ranks or their unequal shares."""
    model = tiny_model("llama")
    whole = gradients(model, batch_of_eight(), 10_000, lam=0.7, normalize="pooled")
    for max_tokens in (30, 10_000):
        file = tmp_path / f"grads-{max_tokens}.pt"
        done = run_python("-m", "tests.train.gradients", str(file), str(max_tokens), ranks=2)
        assert done.returncode == 0, done.stderr
        assert relative_difference(torch.load(file, weights_only=True), whole) < 1e-5


def test_prompt_tokens_get_exactly_zero_gradient() -> None:
    """Catches a mask shifted by one: a logit at a masked target must not move the loss at all."""
    model = tiny_model()
    batch = collate([Draw(make_example([0, 5, 6, 7, 8, 9], first_target=4), False)], [0])
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
    loss, task, synthetic = micro_batch_loss(model, collate(draws, [0]), SourceWeights(1.0, 1.0))
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
            collate(draws, [0, 1, 2, 3]),
            SourceWeights.of(TargetCounts.of(draws), 1, "pooled"),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        p = model(torch.tensor([[0, 5, 6, 7]])).softmax(-1)
    assert p[0, 3, 0] > 0.95, "end-of-text follows the last word"
    assert p[0, 0, 5] > 0.95, "and the seed token, though it is the same id, starts the text"
