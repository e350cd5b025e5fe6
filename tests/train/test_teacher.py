"""A frozen theta* beside the trained model, alone and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.baselines.distill import plain_token_kl
from cfs.data.packing import packed_batch, padded_batch
from cfs.model import Decoder, load_model, save_model
from cfs.train.loss import token_logprobs
from cfs.train.teacher import distilled, frozen_original
from tests.conftest import ALONE, run_python, tiny_model
from tests.train.gradients import batch_of_eight, batch_of_seven, worst_difference
from tests.train.teacher_worker import KL_WEIGHT, TEMPERATURE, Case, Outcome, outcome

EQUAL = 2e-6
"""In bfloat16 too: the ranks change no product, only the order of sums in float32."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers with a head of their own and without, and one stored in half precision."""
    parent = tmp_path_factory.mktemp("originals")
    for name in ("tied", "untied", "half"):
        model = tiny_model("llama", seed=1, tie_word_embeddings=name == "tied")
        dtype = torch.bfloat16 if name == "half" else torch.float32
        save_model(model, parent / name, dtype)
    return parent


@pytest.fixture(scope="module")
def by_ranks(originals: Path) -> dict[int, dict[Case, Outcome]]:
    """What the worker finds on one rank and on two."""
    found = {}
    for ranks in (1, 2):
        file = originals / f"{ranks}.pt"
        arguments = ("-m", "tests.train.teacher_worker", str(originals), str(file))
        done = run_python(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = torch.load(file, weights_only=True)
    return found


def plain_outcome(model: Decoder, teacher: Decoder) -> Outcome:
    """The oracle: all logits of padded rows; what the worker computes of the whole batch."""
    draws = batch_of_seven()
    batch = padded_batch(draws, list(range(len(draws))))
    is_target = batch.target_mask[:, 1:]
    logits = model(batch.input_ids)[:, :-1][is_target]
    targets = batch.input_ids[:, 1:][is_target]
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])
    identity = torch.eye(logits.shape[1])
    with torch.no_grad():
        original = teacher(batch.input_ids)[:, :-1][is_target]
    kl = plain_token_kl(logits, identity, original, identity, TEMPERATURE)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((KL_WEIGHT * kl - logprobs.squeeze(1)).sum(), parameters)
    return [logprobs.sum().item(), kl.sum().item()], dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_loss_and_gradients_equal_plain(name: str, originals: Path) -> None:
    """Catches the teacher at other positions than the student, or the student's own head."""
    student = tiny_model("llama", seed=2, tie_word_embeddings=name == "tied")
    sums, grads = plain_outcome(student, load_model(originals / name))
    our_sums, our_grads = outcome(originals / name, torch.float32, ALONE, per_copy=1)
    assert our_sums == pytest.approx(sums, rel=EQUAL)
    assert worst_difference(our_grads, grads) < 5e-6


def test_ranks_change_nothing(by_ranks: dict[int, dict[Case, Outcome]]) -> None:
    """Catches a head freed or overwritten before the backward pass, losses weighed by rank, and a
    rank without targets that waits or adds."""
    alone, cut = by_ranks[1], by_ranks[2]
    assert len(cut) == 2 * len(alone)
    for (name, dtype, per_copy), (sums, grads) in cut.items():
        wanted_sums, wanted_grads = alone[name, dtype, 1]
        assert sums == pytest.approx(wanted_sums, rel=EQUAL), (name, dtype, per_copy)
        assert worst_difference(grads, wanted_grads) < EQUAL, (name, dtype, per_copy)


def test_half_precision_is_near_float32(by_ranks: dict[int, dict[Case, Outcome]]) -> None:
    """Catches bfloat16 that computes something else than float32 does."""
    for name in ("tied", "untied", "half"):
        half, full = (by_ranks[2][name, dtype, 2] for dtype in (torch.bfloat16, torch.float32))
        assert half[0] == pytest.approx(full[0], rel=0.02)
        assert worst_difference(half[1], full[1]) < 0.05


def test_a_student_at_the_start_is_no_distance_away(originals: Path) -> None:
    """Catches a teacher that is not the model the run starts from: KL and its gradient are 0."""
    draws = batch_of_eight()
    batch = packed_batch(draws, list(range(len(draws))))
    model = load_model(originals / "untied")
    logprobs, kl = distilled(
        model, frozen_original(originals / "untied", ALONE, torch.float32), batch, 2.0
    )
    torch.testing.assert_close(logprobs, token_logprobs(model, batch), rtol=1e-6, atol=1e-6)
    assert not kl.any()
    for grad in torch.autograd.grad(kl.sum(), list(model.parameters())):
        assert not grad.any()


def test_head_of_ones_own() -> None:
    """Catches a head that is handed other positions, weights or ids than log p is made of."""
    draws = batch_of_eight()
    batch = padded_batch(draws, list(range(len(draws))))
    model = tiny_model("olmo")

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    ours = model(batch.input_ids, batch.target_mask, head=head)
    torch.testing.assert_close(ours, model(batch.input_ids, batch.target_mask))
