"""theta* as local rows, and the l2 penalty towards it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cfs.baselines.l2 import add_distance
from cfs.errors import UserError
from cfs.model import load_model, save_model
from cfs.model.weights import open_weights
from cfs.train.parallel import local_shards
from cfs.train.reference import rows_of, stored_rows
from tests.conftest import run_python, tiny_model


def stored_model(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_model(tiny_model("llama", tie_word_embeddings=True), path, dtype)
    return path


@pytest.mark.parametrize("on_host", [False, True])
def test_penalty_and_gradient_are_those_of_autograd(tmp_path: Path, on_host: bool) -> None:
    """Catches a factor of two, a parameter left out, and the tied table counted twice."""
    stored = open_weights(stored_model(tmp_path / "m"))
    model = load_model(tmp_path / "m")
    shards = local_shards(model)
    anchors = stored_rows(shards, stored, on_host)
    starts = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.grad = torch.ones_like(parameter)
    distance = add_distance(shards, anchors, 0.3)
    expected = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), starts, strict=True))
    grads = torch.autograd.grad(0.3 * expected, list(model.parameters()))
    assert float(distance) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 1 + grad)


def test_it_is_zero_at_the_start_and_takes_the_checkpoints_dtype(tmp_path: Path) -> None:
    """Catches theta* in float32 beside a bfloat16 checkpoint, and masters that start elsewhere."""
    stored = open_weights(stored_model(tmp_path / "m", torch.bfloat16))
    for masters in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path / "m", masters)
        shards = local_shards(model)
        anchors = stored_rows(shards, stored)
        assert float(add_distance(shards, anchors, 1.0)) == 0.0
        num_bytes = sum(rows.nbytes for rows in anchors)
        assert num_bytes == 2 * sum(p.numel() for p in model.parameters())
    stored = open_weights(stored_model(tmp_path / "wide", torch.float32))
    narrow = load_model(tmp_path / "wide", torch.bfloat16)
    shards = local_shards(narrow)
    assert float(add_distance(shards, stored_rows(shards, stored), 1.0)) == 0.0


def test_a_parameter_without_a_gradient_is_still_pulled_back(tmp_path: Path) -> None:
    """Catches a penalty that skips what the batch did not touch."""
    stored = open_weights(stored_model(tmp_path / "m"))
    model = load_model(tmp_path / "m")
    shards = local_shards(model)
    anchors = stored_rows(shards, stored)
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    assert float(add_distance(shards, anchors, 0.5)) == pytest.approx(model.norm.weight.numel())
    torch.testing.assert_close(model.norm.weight.grad, torch.ones_like(model.norm.weight))


@pytest.mark.parametrize(("ranks", "per_copy"), [(2, 2), (4, 2), (3, 3)])
def test_ranks_hold_their_rows_and_agree_on_the_penalty(
    ranks: int, per_copy: int, tmp_path: Path
) -> None:
    """Catches rows read from the wrong place, and replicas of hybrid sharding counted twice."""
    stored_model(tmp_path / "m")
    done = run_python("-m", "tests.train.sharded", str(tmp_path / "m"), str(per_copy), ranks=ranks)
    assert done.returncode == 0, done.stderr
    alone = run_python("-m", "tests.train.sharded", str(tmp_path / "m"), "1")
    said, expected = json.loads(done.stdout), json.loads(alone.stdout)
    assert said["distance"] == pytest.approx(expected["distance"], rel=1e-6)
    assert said["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert said["reference_bytes"] <= expected["reference_bytes"] * (1 / per_copy + 0.05)


def test_a_model_of_another_shape_is_refused_by_its_flag(tmp_path: Path) -> None:
    """Catches rows of another model read as if they were of this one."""
    stored = open_weights(stored_model(tmp_path / "m"))
    save_model(tiny_model("llama", hidden_size=64), tmp_path / "other")
    shards = local_shards(load_model(tmp_path / "m"))
    with pytest.raises(UserError, match=r"--tuned .*other: is no model of the shape of"):
        rows_of(str(tmp_path / "other"), "--tuned", shards, stored)
