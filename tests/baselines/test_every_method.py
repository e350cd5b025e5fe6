"""Of every method: several ranks train as one, and a resumed run as an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfs.train.loop import train
from tests.baselines.every_method import CASES, COPIED, STEPS, case_run, train_all
from tests.conftest import ALONE, run_python
from tests.train.runs import same, tuned_model, weights


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[n] - other[n]).float().square().sum()) for n in one))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one rank has trained every case."""
    place = tmp_path_factory.mktemp("every_method")
    tuned_model(place)
    train_all(place, CASES, ALONE)
    return place


# A quantised moment that rounding tips over is a step of its table apart: 8-bit states, which the
# ends of ranks also cut into other blocks. So is a bfloat16 master that is rounded stochastically.
LOOSER = {
    "mofo, 8-bit": (3e-2, 7e-5),
    "lota, 8-bit": (2e-4, 1e-6),
    "l2, 8-bit": (4e-3, 2e-5),
    "sfa, bfloat16": (0.15, 2e-3),
    "l2, 8-bit, bfloat16": (0.15, 2e-3),
}


def check_as_one(place: Path, case: str, num_ranks: int) -> None:
    """Losses, gradient norms and weights are those of one rank, up to rounding."""
    far, off = LOOSER.get(case, (3e-5, 1e-6))
    one, several = (
        torch.tensor(json.loads((place / f"{case}-{n}.json").read_text())) for n in (1, num_ranks)
    )
    torch.testing.assert_close(several, one, rtol=off, atol=0.0, msg=lambda m: f"{case}: {m}")
    start, end, found = (
        load_file(place / f"{case}-{which}.safetensors") for which in ("1-start", "1", num_ranks)
    )
    assert end.keys() == found.keys()
    apart, moved = distance(end, found), distance(end, start)
    assert moved > 0, f"{case} does nothing"
    assert apart / moved < far, case


def test_two_ranks_train_as_one(alone: Path) -> None:
    """Catches rows of the wrong rank, a choice among a rank's own entries alone, a penalty or an
    inner product counted twice, adapters drawn anew on each rank."""
    done = run_python("-m", "tests.baselines.every_method", str(alone), ranks=2)
    assert done.returncode == 0, done.stderr
    for case in CASES:
        check_as_one(alone, case, 2)


def test_copies_of_a_model_train_as_one(alone: Path) -> None:
    """Catches sums over the ranks of all copies where one copy's are meant: penalties and Fisher
    information too large, entries counted twice, and copies that drift apart."""
    done = run_python("-m", "tests.baselines.every_method", str(alone), "2", ranks=4)
    assert done.returncode == 0, done.stderr
    for case in COPIED:
        check_as_one(alone, case, 4)


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted_bit_for_bit(case: str, tmp_path: Path) -> None:
    """Catches a state that a method forgets, or begins anew with weights that have moved."""
    whole = case_run(tmp_path, "whole", case, ALONE)
    assert train(whole)
    assert not train(case_run(tmp_path, "cut", case, ALONE, stop_after=3))
    resumed = case_run(tmp_path, "cut", case, ALONE)
    assert resumed.progress.step == 3
    assert train(resumed)
    assert same(weights(resumed), weights(whole))
    assert whole.progress.step == STEPS


def test_a_run_moves_the_chosen_entries_alone(tmp_path: Path) -> None:
    """Catches a loop that never calls a method's filter, or drops what it left."""
    for case, share in (("mofo", 0.2), ("lota", 0.3)):
        run = case_run(tmp_path, case, case, ALONE, steps=1, weight_decay=0.0)
        before = weights(run)
        train(run)
        moved = {name: value != before[name] for name, value in weights(run).items()}
        chosen = [m for name, m in moved.items() if m.ndim == 2 and "embed" not in name]
        groups = chosen if case == "mofo" else [torch.cat([m.view(-1) for m in chosen])]
        for group in groups:
            assert 0.9 * share < float(group.float().mean()) < 1.01 * share, case
        if case == "lota":
            assert not any(moved[n].any() for n in moved if "embed" in n or moved[n].ndim == 1)
