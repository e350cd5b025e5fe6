"""Tensors come back bit for bit, on whichever number of ranks, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.train.checkpoint import load, saved_tensors
from tests.conftest import ALONE, run_python
from tests.train.checkpoint_worker import WORKER, check, save_two
from tests.train.checkpoints import saved, tensors_of


@pytest.mark.parametrize(("saving", "loading"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_other_ranks_read_the_same_bits(tmp_path: Path, saving: int, loading: int) -> None:
    """Catches parts lost or misplaced when the rows are dealt anew: uneven and empty shards,
    tensors without a dimension, dtypes, keys of one rank; and a write that sees later values."""
    if saving == 1:
        save_two(tmp_path, ALONE)
    else:
        done = run_python(*WORKER, "save", str(tmp_path), ranks=saving)
        assert done.returncode == 0, done.stderr
    if loading == 1:
        check(tmp_path, ALONE, saving)
    else:
        done = run_python(*WORKER, "check", str(tmp_path), str(saving), ranks=loading)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"a": torch.zeros(300, 8)},
            r"tensor a is \[300, 7\] float32, expected \[300, 8\] float32",
        ),
        ({"a": torch.zeros(300, 7).double()}, r"float32, expected \[300, 7\] float64"),
        ({"b": torch.zeros(1, dtype=torch.int64)}, r"tensor b is \[\] int64, expected \[1\] int64"),
        ({"c": torch.zeros(1)}, "has no tensor c"),
    ],
)
def test_tensors_must_fit(tmp_path: Path, changes: dict[str, Tensor], found: str) -> None:
    """Catches values that are cut, cast or left as they were, and a load that fails half-way."""
    [path] = saved(tmp_path, 3)
    tensors = tensors_of(0) | changes
    with pytest.raises(UserError, match=found):
        load(path, tensors, ALONE)
    assert all(not tensor.any() for tensor in tensors.values())


def test_headers_tell_shapes_and_part_of_the_tensors_can_be_loaded(tmp_path: Path) -> None:
    """Catches a reader that needs all the tensors to know or to fill some."""
    [path] = saved(tmp_path, 3)
    assert saved_tensors(path) == {"a": ((300, 7), torch.float32), "b": ((), torch.int64)}
    tensors = {"b": torch.tensor(0)}
    load(path, tensors, ALONE)
    assert tensors["b"] == 3
