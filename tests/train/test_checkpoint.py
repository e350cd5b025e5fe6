"""Checkpoints are written beside training, and are there whole or not at all."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cfs.errors import UserError
from cfs.train import checkpoint
from cfs.train.checkpoint import Checkpoints, latest, read_facts
from tests.conftest import ALONE, run_python
from tests.train.checkpoint_worker import WORKER, check
from tests.train.checkpoints import loads, names, saved, tensors_of


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Gate:
    """Holds background writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        write = checkpoint.write_tensors

        def held(*arguments: object) -> None:
            self.open.wait()
            write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(checkpoint, "write_tensors", held)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a save that waits for the disk, and one that writes what training made of the
    tensors and facts meanwhile."""
    gate = Gate(monkeypatch)
    tensors, facts = tensors_of(4), {"step": 4}
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(4, tensors, facts)
    for tensor in tensors.values():
        tensor.zero_()
    facts["step"] = 0
    assert latest(tmp_path) is None
    checkpoints.poll()
    gate.open.set()
    checkpoints.finish()
    assert loads(tmp_path / "step-000004", 4)
    assert read_facts(tmp_path / "step-000004") == {"step": 4}


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two writes in flight, whose collectives and clean-up would mix."""
    gate = Gate(monkeypatch)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(1, tensors_of(1), {})
    threading.Timer(0.1, gate.open.set).start()
    checkpoints.save(2, tensors_of(2), {})
    assert loads(tmp_path / "step-000001", 1)
    checkpoints.finish()
    assert loads(tmp_path / "step-000002", 2)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Catches an order by name or age, and a checkpoint that is removed too early or never."""
    directory = tmp_path / "checkpoints"
    saved(directory, 999999, 1000000, keep=2)
    assert names(directory) == ["step-1000000", "step-999999"]
    assert latest(directory) == directory / "step-1000000"
    saved(directory, 1000001, keep=2)
    assert names(directory) == ["step-1000000", "step-1000001"]
    saved(directory, 1000002, keep=1)
    assert names(directory) == ["step-1000002"]
    assert latest(tmp_path / "nothing") is None


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    """Catches a resumed run that fails, or leaves its leftovers, where it meets an old step; and
    the same state that is written twice in one run."""
    saved(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(2, tensors_of(7), {}, wait=True)
    checkpoints.save(2, tensors_of(8), {}, wait=True)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert loads(tmp_path / "step-000002", 7)


@pytest.mark.parametrize("where", ["tensors", "manifest", "removal"])
def test_a_killed_save_leaves_whole_checkpoints(tmp_path: Path, where: str) -> None:
    """Catches a half-written or half-removed directory under a checkpoint's name."""
    done = run_python(*WORKER, "kill", str(tmp_path), where)
    assert done.returncode == 9, done.stderr
    newest = 3 if where == "removal" else 2
    assert [n for n in names(tmp_path) if n.startswith("step")] == [
        f"step-{newest - 1:06d}",
        f"step-{newest:06d}",
    ]
    assert any(name.startswith(".step-") for name in names(tmp_path))
    check(tmp_path, ALONE, 1, newest)
    saved(tmp_path, 4, keep=3)
    assert names(tmp_path) == [f"step-{step:06d}" for step in (newest - 1, newest, 4)]


def test_a_full_disk_is_told_and_harms_nothing(tmp_path: Path) -> None:
    """Catches a failed write that goes unnoticed, takes the last good checkpoint with it, or
    leaves its half behind."""
    [path] = saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, ALONE)
    with full_disk(4096):
        checkpoints.save(2, tensors_of(2), {})
        assert checkpoints._writing is not None
        checkpoints._writing.exception()
    assert checkpoints.failed
    with pytest.raises(
        UserError, match=r"step-000002: cannot .*File too large.*from step-000001, which"
    ):
        checkpoints.poll()
    assert names(tmp_path) == ["step-000001"]
    assert loads(path, 1)
    checkpoints.poll()
    checkpoints.save(2, tensors_of(2), {}, wait=True)
    assert loads(tmp_path / "step-000002", 2)


def test_a_failed_write_is_raised_by_the_next_save(tmp_path: Path) -> None:
    """Catches a failure that only `poll` tells of, and a first checkpoint's that promises an
    earlier one."""
    checkpoints = Checkpoints(tmp_path, ALONE)
    with full_disk(4096):
        checkpoints.save(1, tensors_of(1), {})
        with pytest.raises(UserError, match="there is no earlier checkpoint"):
            checkpoints.save(2, tensors_of(2), {})
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Catches a traceback where the place is no directory, or is read-only."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/step-000001: cannot be written \("):
        saved(tmp_path / "file", 1)


def test_a_rank_without_room_stops_all(tmp_path: Path) -> None:
    """Catches ranks that part ways when one of them cannot write, and a message from each."""
    done = run_python(*WORKER, "full", str(tmp_path), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "step-000003: cannot be written (File too large); free or mend" in done.stderr
    assert "--resume goes on from step-000002, which still stands" in done.stderr
    assert names(tmp_path) == ["step-000001", "step-000002"]
    check(tmp_path, ALONE, saved_on=2)


def test_the_end_of_a_rank_is_noticed(tmp_path: Path) -> None:
    """Catches ranks that wait for ever for the part of one that ended."""
    done = run_python(*WORKER, "die", str(tmp_path), ranks=2)
    assert "checkpoint_worker.py: error: another rank ended" in done.stderr
    check(tmp_path, ALONE, saved_on=2)
