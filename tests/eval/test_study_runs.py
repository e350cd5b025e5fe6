"""Running a study: once, in order, several at a time, and on after failures and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import reproduce
from cfs import cli
from cfs.errors import UserError
from cfs.eval import study_runs
from tests.conftest import REPOSITORY
from tests.eval.fake_trainer import ROWS, put_in_place, run_reproduce, write_study


@pytest.fixture(autouse=True)
def _fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(tmp_path, monkeypatch)


def summary_of(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "runs" / name / "summary.json").read_text())


def test_a_study_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run before the one that it needs, more at a time than asked for, threads that
    crowd the machine, and finished runs that are run again."""
    out = tmp_path / "out"
    monkeypatch.setattr(study_runs, "num_cores", lambda: 6)
    rows = [row | {"flags": {"sleep": 0.1, **row.get("flags", {})}} for row in ROWS]
    command = [write_study(tmp_path, rows), "--seeds", "2", "--jobs", "3", "--out", str(out)]
    assert run_reproduce(monkeypatch, *command) == 0
    names = [file.parent.name for file in out.glob("runs/*/summary.json")]
    assert len(names) == 8
    summaries = {name: summary_of(out, name) for name in names}
    assert {summary["threads"] for summary in summaries.values()} == {"2"}
    for seed in range(2):
        needed, needing = summaries[f"cfs-1-{seed}"], summaries[f"merged-{seed}"]
        assert needed["span"][1] <= needing["span"][0]
    starts = [summary["span"][0] for summary in summaries.values()]
    at_once = [sum(s["span"][0] <= t < s["span"][1] for s in summaries.values()) for t in starts]
    assert 2 <= max(at_once) <= 3
    assert (out / "table.md").is_file()

    (out / "runs" / "ft-1" / "summary.json").unlink()
    (out / "runs" / "ft-1" / "model").rmdir()
    assert run_reproduce(monkeypatch, *command) == 0
    again = {name: summary_of(out, name) for name in names}
    assert [name for name in names if again[name] != summaries[name]] == ["ft-1"]


def test_a_failing_run_is_named_and_the_others_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a study lost to one run, its reason lost, and a run without the model it needs."""
    rows = [*ROWS[:1], {"label": "cfs", "method": "cfs", "flags": {"fail": "--lam 9: too much"}}]
    rows += [*ROWS[2:], {"label": "last", "method": "last"}]
    out = tmp_path / "out"
    command = [write_study(tmp_path, rows), "--seeds", "1", "--out", str(out)]
    assert run_reproduce(monkeypatch, *command) == 1
    error = capsys.readouterr().err
    assert f"cfs-0 failed: --lam 9: too much (exit code 1; {out / 'logs' / 'cfs-0.err'})" in error
    assert "merged-0: not run, as cfs-0 failed" in error
    assert "2 of 4 runs failed (cfs-0, merged-0)" in error
    assert (out / "runs" / "last-0" / "summary.json").is_file()
    assert "Without a finished run: cfs (fail --lam 9: too much), merged." in (
        (out / "table.md").read_text()
    )
    rows[1] = {"label": "cfs", "method": "cfs", "flags": {"lam": 8}}
    write_study(tmp_path, rows)
    assert run_reproduce(monkeypatch, *command) == 0


def test_other_settings_in_the_same_place_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a table of runs with other settings than it says."""
    command = [write_study(tmp_path, ROWS), "--seeds", "1", "--out", str(tmp_path / "out")]
    assert run_reproduce(monkeypatch, *command, "--only", "ft") == 0
    assert run_reproduce(monkeypatch, *command, "--steps", "8") == 2
    assert "run ft-0 was begun with --steps 7.0, now 8.0" in capsys.readouterr().err
    assert run_reproduce(monkeypatch, *command) == 0


def test_a_dry_run_tells_and_runs_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a dry run that leaves something behind, and an estimate made of nothing."""
    out = tmp_path / "out"
    command = [write_study(tmp_path, ROWS), "--seeds", "1", "--jobs", "2", "--out", str(out)]
    assert run_reproduce(monkeypatch, *command, "--dry-run") == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "to do  ft-0: --method ft --steps 7"
    assert lines[2] == "to do  merged-0: --method merged  (after cfs-1-0)"
    assert lines[4] == (
        "4 runs: 0 done, 0 begun, 4 to do; 2 at a time; estimated time: unknown, as no run is "
        "finished yet"
    )
    assert run_reproduce(monkeypatch, *command, "--only", "ft") == 0
    capsys.readouterr()
    assert run_reproduce(monkeypatch, *command, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("done   ft-0")
    assert lines[1].endswith("(model needed by 1 run)")
    # Three runs of the minute that the fake trainer claims, two at a time.
    assert lines[4].endswith("1 done, 0 begun, 3 to do; 2 at a time; estimated time: about 90 s")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_study_stops_its_runs_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """Catches orphans that train on, and a study that must begin anew."""
    rows = [row | {"flags": {"sleep": 60}} for row in ROWS[:1]] + ROWS[1:2]
    out = tmp_path / "out"
    program = (
        "import signal\nimport reproduce\nfrom cfs import cli\n"
        # Ignored where a shell has put the tests in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"reproduce.TRAINER = {reproduce.TRAINER!r}\n"
        "cli.run(reproduce.main, resumes=reproduce.AGAIN)"
    )
    arguments = [write_study(tmp_path, rows), "--seeds", "1", "--jobs", "1", "--out", str(out)]
    command = [sys.executable, "-c", program, *arguments]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    study = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "runs" / "ft-0" / "begun").exists():
        assert time.monotonic() < deadline, "the first run never began"
        time.sleep(0.02)
    study.send_signal(number)
    _, error = study.communicate(timeout=60)
    assert study.returncode == (130 if number == signal.SIGINT else cli.EXIT_SIGTERM)
    assert "run the same command again" in error
    assert (out / "runs" / "ft-0" / "stopped").exists()
    assert not (out / "runs" / "cfs-1-0").exists()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (out / "runs" / "cfs-1-0" / "summary.json").is_file()


def test_two_studies_cannot_share_a_place(tmp_path: Path) -> None:
    """Catches every run trained twice at the same time."""
    with (
        study_runs.claimed(tmp_path),
        pytest.raises(UserError, match="another process runs"),
        study_runs.claimed(tmp_path),
    ):
        pass
