"""Which entries MoFO moves."""

from __future__ import annotations

import pytest
import torch

from cfs.baselines.method import Update
from cfs.baselines.mofo import Mofo
from cfs.errors import UserError
from tests.baselines.lockstep import lone_setting, lone_shard, train
from tests.train.cut import CutRun, random_grads, random_weights

LR, WEIGHT_DECAY, STEPS = 1e-2, 0.1, 3


def begun(fraction: float) -> Mofo:
    method = Mofo(mofo_fraction=fraction)
    method.begin(lone_setting([], [], []))
    return method


def filtered(method: Mofo, exp_avg: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights of 5 that were 4, after `decayed` 0.75."""
    before = torch.full_like(exp_avg, 4.0)
    shard = lone_shard("w", torch.full_like(exp_avg, 5.0, dtype=dtype))
    weights = shard.local.view(-1)
    method.after_update(Update(0, shard, weights, before.view(-1), lambda: exp_avg.view(-1), 0.75))
    return shard.local


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_momenta_move_and_the_others_decay(dtype: torch.dtype) -> None:
    """Catches signed momenta, a mask turned over, k rounded up, and decay left out or doubled."""
    exp_avg = torch.tensor([[0.1, -0.9, 0.3], [0.5, -0.2, 0.0]])
    found = filtered(begun(0.49), exp_avg, dtype)  # 2.94 of 6
    assert found.dtype == dtype
    assert found.tolist() == [[3.0, 5.0, 3.0], [5.0, 3.0, 3.0]]


def test_ties_with_the_threshold_all_move() -> None:
    """Catches an arbitrary choice among equals, which would differ between numbers of ranks."""
    exp_avg = torch.tensor([[0.5, -0.5], [0.5, 0.1]])
    assert filtered(begun(0.25), exp_avg, torch.float32).tolist() == [[5.0, 5.0], [5.0, 3.0]]


def test_at_least_one_entry_moves() -> None:
    """Catches k = 0, which would freeze a small matrix for good."""
    exp_avg = torch.tensor([[0.5, -0.7]])
    assert filtered(begun(0.01), exp_avg, torch.float32).tolist() == [[3.0, 5.0]]


def test_gains_are_not_filtered() -> None:
    """Catches norms under the filter."""
    exp_avg = torch.tensor([0.5, -0.7, 0.1])
    assert filtered(begun(0.3), exp_avg, torch.float32).tolist() == [5.0, 5.0, 5.0]


def steps(fraction: float, count: int) -> CutRun:
    run = CutRun(random_weights(), "adamw", count, WEIGHT_DECAY)
    grads = [random_grads(step) for step in range(STEPS)]
    train(lambda: Mofo(mofo_fraction=fraction), run, grads, LR)
    return run


def test_fraction_1_is_adamw_bit_for_bit() -> None:
    """Catches a filter that recomputes what it should leave alone."""
    plain = CutRun(random_weights(), "adamw", 1, WEIGHT_DECAY)
    for step in range(STEPS):
        plain.step(random_grads(step), LR, step)
    found = steps(1.0, 1).weights()
    assert all(torch.equal(found[name], value) for name, value in plain.weights().items())


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_move_the_entries_that_one_rank_moves(count: int) -> None:
    """Catches a threshold of each rank's rows, and k of its rows; one rank holds none of some."""
    alone, cut = steps(0.15, 1).weights(), steps(0.15, count).weights()
    for name, value in alone.items():  # AdamW's own last bit depends on where a rank's rows end
        torch.testing.assert_close(cut[name], value, rtol=1e-6, atol=1e-8)


def test_steps_follow_the_authors_order() -> None:
    """Catches moments of filtered entries that stand still, a filter on last step's momentum, and
    bias corrections that count only an entry's own updates; the rule is written out here."""
    run = steps(0.15, 1)
    weights = random_weights()
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(STEPS):
        for name, grad in random_grads(step).items():
            w, m, v = weights[name], mean[name], square[name]
            is_matrix = w.ndim >= 2
            w.mul_(1 - LR * WEIGHT_DECAY * is_matrix)
            m.lerp_(grad, 1 - 0.9)
            v.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            moved = m.clone()
            if is_matrix:
                largest = m.abs().flatten().topk(int(m.numel() * 0.15)).values
                moved[m.abs() < largest.min()] = 0.0
            root = v.sqrt() / (1 - 0.999 ** (step + 1)) ** 0.5 + 1e-8
            w.sub_(LR / (1 - 0.9 ** (step + 1)) * moved / root)
    saved = run.saved()
    for name, value in run.weights().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(saved[f"optimizer.exp_avg.{name}"], mean[name])


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    """Catches a run that would move nothing."""
    with pytest.raises(UserError, match=r"--mofo-fraction .* in \(0, 1\]"):
        Mofo(mofo_fraction=fraction).check()
