"""Run directories: what may be written where, and which run is gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cfs.errors import UserError
from cfs.train.config import TrainConfig
from cfs.train.rundir import claimed_run_directory, recalled


def counted(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(out=str(out), **changes)  # type: ignore[arg-type]
    return config.resolved("cpu", 256).counted(6000)


def begin(config: TrainConfig) -> Path:
    with claimed_run_directory(config, ["a test"]) as out:
        return out


def recall(**given: object) -> TrainConfig:
    return recalled(TrainConfig(**given), set(given))  # type: ignore[arg-type]


def test_a_run_is_not_overwritten_and_resume_is_named(tmp_path: Path) -> None:
    """Catches a second run that writes into the first one's checkpoints."""
    out = begin(counted(tmp_path / "run"))
    (out / "checkpoints" / "step-000120").mkdir(parents=True)
    with pytest.raises(UserError, match=r"with checkpoint step-000120; --resume goes on with it"):
        begin(counted(out))
    begin(counted(out, resume=True))


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    """Catches a run among someone's files, also with --resume."""
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            begin(counted(tmp_path, resume=resume))
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_alone_recalls_the_run_and_other_flags_are_held_against_it(tmp_path: Path) -> None:
    """Catches a run that goes on with another learning rate, or with the defaults."""
    out = begin(counted(tmp_path / "run", lr=2e-4, steps=30, save_every=7))
    again = recall(out=str(out), resume=True)
    assert (again.lr, again.steps, again.save_every) == (2e-4, 30, 7)
    begin(again.resolved("cpu", 256).counted(6000))
    other = recall(out=str(out), resume=True, lr=1e-3)
    with pytest.raises(UserError, match=r"--lr 0.001: the run in .* began with 0.0002"):
        begin(other.resolved("cpu", 256).counted(6000))
    default = recall(out=str(out), resume=True, lam=1.0, method="cfs")
    begin(default.resolved("cpu", 256).counted(6000))
    half = begin(counted(tmp_path / "half", clip=0.5, steps=30))
    given_as_default = recall(out=str(half), resume=True, clip=1.0)
    with pytest.raises(UserError, match=r"--clip 1.0: the run in .* began with 0.5"):
        begin(given_as_default.resolved("cpu", 256).counted(6000))
    moved = recall(out=str(out), resume=True, keep=5, micro_batch_tokens=512)
    begin(moved.resolved("cpu", 256).counted(6000))


def test_the_same_epochs_resume_the_run_they_began(tmp_path: Path) -> None:
    """Catches --epochs and the steps they became taken for a contradiction."""
    begun = TrainConfig(out=str(tmp_path / "run"), epochs=2.0, lr=1e-4)
    out = begin(begun.resolved("cpu", 256).counted(640))
    again = (
        recalled(replace(begun, resume=True), {"out", "resume", "epochs", "lr"})
        .resolved("cpu", 256)
        .counted(640)
    )
    assert again.steps == 40
    begin(again)
    more = (
        recalled(replace(begun, resume=True, epochs=3.0), {"out", "resume", "epochs", "lr"})
        .resolved("cpu", 256)
        .counted(640)
    )
    with pytest.raises(UserError, match=r"--steps 60: the run in .* began with 40"):
        begin(more)
    assert out == tmp_path / "run"


def test_where_a_run_stopped_is_not_where_it_resumes_to(tmp_path: Path) -> None:
    """Catches a --stop-after that ends the resumed run as well."""
    out = begin(counted(tmp_path / "run", stop_after=3))
    assert recall(out=str(out), resume=True).stop_after is None
    again = recall(out=str(out), resume=True, stop_after=5)
    assert again.stop_after == 5


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    """Catches a job started twice."""
    config = counted(tmp_path / "run", resume=True)
    with (
        claimed_run_directory(config, []),
        pytest.raises(UserError, match="another process"),
        claimed_run_directory(config, []),
    ):
        pass


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    """Catches a traceback of the YAML reader."""
    out = begin(counted(tmp_path / "run"))
    (out / "config.yaml").write_text("steps: [1\n")
    with pytest.raises(UserError, match=r"config.yaml: cannot be read"):
        recall(out=str(out), resume=True)
