"""Of every method: two ranks train as one, and a resumed run as an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfs.train.loop import train
from tests.baselines.every_method import METHODS, STEPS, method_run
from tests.conftest import ALONE, run_python
from tests.train.runs import same, tuned_model, weights


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in one))


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Catches rows of the wrong rank, a choice among a rank's own entries alone, a penalty or an
    inner product counted twice, adapters drawn anew on each rank."""
    tuned_model(tmp_path)
    losses = {}
    for ranks in (1, 2):
        done = run_python("-m", "tests.baselines.every_method", str(tmp_path), ranks=ranks)
        assert done.returncode == 0, done.stderr
        losses[ranks] = json.loads(done.stdout.splitlines()[-1])
    for method in METHODS:
        assert losses[2][method] == pytest.approx(losses[1][method], rel=1e-5), method
        start, one, two = (
            load_file(tmp_path / f"{method}-{which}.safetensors") for which in ("start", "1", "2")
        )
        assert one.keys() == two.keys()
        apart, moved = distance(one, two), distance(one, start)
        print(f"{method}: {apart / moved:.1e} of the distance moved")
        assert apart / moved < 1e-4, method


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Catches a state that a method forgets, or begins anew with weights that have moved."""
    whole = method_run(tmp_path, "whole", method, ALONE)
    assert train(whole)
    assert not train(method_run(tmp_path, "cut", method, ALONE, stop_after=3))
    resumed = method_run(tmp_path, "cut", method, ALONE)
    assert resumed.progress.step == 3
    assert train(resumed)
    assert same(weights(resumed), weights(whole))
    assert whole.progress.step == STEPS


def test_every_method_moves_something(tmp_path: Path) -> None:
    """Catches a method that takes the gradients and does nothing with them."""
    for method in METHODS:
        run = method_run(tmp_path, method, method, ALONE)
        before = weights(run)
        train(run)
        after = weights(run)
        assert any(not torch.equal(before[name], after[name]) for name in before), method
