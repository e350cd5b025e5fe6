"""The runs of a study, several at a time, and what is kept of them.

OUT/runs/NAME/        what train.py leaves; finished once its summary.json is there
OUT/corpora/          samples that the runs share
OUT/logs/NAME.json    the settings that NAME was begun with
OUT/logs/NAME.out, NAME.err   what it printed
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cfs.errors import UserError
from cfs.eval.studies import Plan, Run
from cfs.files import blaming, write_atomically
from cfs.progress import Bar

POLL_S = 0.1
GRACE_S = 60.0
"""How long runs that are told to stop may take to save; `train.py` ends its step first."""
Children = dict[str, subprocess.Popen[bytes]]


class FailedRunsError(UserError):
    """Some runs failed, and the others are finished."""

    exit_code = 1


def num_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def read_summary(out: Path, name: str) -> dict[str, Any] | None:
    """A finished run's summary.json; None for a run that is not finished."""
    file = out / "runs" / name / "summary.json"
    if not file.is_file():
        return None
    try:
        with blaming(file, "check its permissions", "read"):
            summary = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(summary, dict):
            return summary
    except (json.JSONDecodeError, UnicodeDecodeError):
        pass
    raise UserError(f"{file}: damaged (no JSON object); remove {file.parent} to run it again")


def check_records(out: Path, runs: list[Run]) -> None:
    """Refuse an `out` whose runs have other settings than those planned now."""
    for run in runs:
        record, place = _record(out, run), out / "runs" / run.name
        if not place.exists():  # it never began, or its flags were refused
            continue
        try:
            began = json.loads(record.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{place}: is there, but {record} does not say with which settings it was begun; "
                "choose another --out, or remove both to run it again"
            ) from error
        now = run.settings()
        if began != now:
            raise UserError(
                f"{out}: run {run.name} was begun with {_difference(began, now)}; choose another "
                "--out or the same settings"
            )


def _difference(began: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that two runs differ in, in words."""
    flat_began, flat_now = ({**s, **s["flags"]} for s in (began, now))
    for key in [key for key in flat_began | flat_now if key != "flags"]:
        then, this = flat_began.get(key), flat_now.get(key)
        if then != this:
            absent = "no --" + key
            return f"--{key} {then}, now {this}" if then is not None else f"{absent}, now {this}"
    return "other settings"


def seconds_left(out: Path, runs: list[Run], jobs: int) -> float | None:
    """An estimate by what finished runs took, those of the same method first; None without any."""
    taken: dict[str, list[float]] = {}
    left: list[Run] = []
    for run in runs:
        summary = read_summary(out, run.name)
        if summary is None:
            left.append(run)
        elif isinstance(summary.get("seconds"), int | float):
            taken.setdefault(run.method, []).append(summary["seconds"])
    everything = [seconds for values in taken.values() for seconds in values]
    if not everything:
        return None if left else 0.0
    costs = [taken.get(run.method, everything) for run in left]
    return sum(sum(cost) / len(cost) for cost in costs) / min(jobs, max(1, len(left)))


def describe(out: Path, plan: Plan, runs: list[Run], jobs: int) -> str:
    """What a study would do: each run, what shares it, what is done already, and the cost."""
    lines, states = [], []
    for run in runs:
        state = "done" if read_summary(out, run.name) is not None else "to do"
        if state == "to do" and (out / "runs" / run.name).is_dir():
            state = "begun"
        states.append(state)
        flags = " ".join(f"--{flag} {value}" for flag, value in _shown(run).items())
        labels, needed_by = plan.users(run.name)
        notes = [f"shared by {', '.join(labels)}"] if len(labels) > 1 else []
        notes += [f"after {run.needs}"] if run.needs is not None else []
        if count := len(needed_by):
            notes.append(f"model needed by {count} run{'s' * (count > 1)}")
        lines.append(f"{state:5}  {run.name}: --method {run.method} {flags}".rstrip())
        lines[-1] += f"  ({'; '.join(notes)})" if notes else ""
    seconds = seconds_left(out, runs, jobs)
    cost = (
        "unknown, as no run is finished yet" if seconds is None else f"about {shown_time(seconds)}"
    )
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("done", "begun", "to do"))
    lines.append(f"{len(runs)} runs: {counts}; {jobs} at a time; estimated time: {cost}")
    return "\n".join(lines)


def shown_time(seconds: float) -> str:
    """Rounded to what an estimate is worth."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _shown(run: Run) -> dict[str, str]:
    return {
        flag: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for flag, value in run.flags.items()
    }


# ------------------------------------------------------------------------------------ running


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold a study's directory against other processes."""
    with blaming(out, "choose another --out"):
        for name in ("runs", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another process runs this study now") from error
        yield


def run_all(out: Path, runs: list[Run], trainer: list[str], jobs: int) -> dict[str, str]:
    """Run what is not finished, `jobs` at a time; the reason for each run that failed, by name.

    trainer  the command that `Run.arguments` belong to

    The others go on where one fails. On the way out by an exception the runs in progress are told
    to stop, which `train.py` answers by saving.
    """
    finished = {run.name for run in runs if read_summary(out, run.name) is not None}
    waiting = [run for run in runs if run.name not in finished]
    failures: dict[str, str] = {}
    threads = str(max(1, num_cores() // jobs))
    with Bar("runs", len(runs), first=len(finished)) as bar, stopped_on_error() as children:
        while waiting or children:
            for run in list(waiting):
                if run.needs in failures:
                    waiting.remove(run)
                    failures[run.name] = f"not run, as {run.needs} failed"
                    print(f"{run.name}: {failures[run.name]}", file=sys.stderr, flush=True)
                    bar.advance(1, run.name)
                elif len(children) < jobs and (run.needs is None or run.needs in finished):
                    waiting.remove(run)
                    children[run.name] = _start(out, run, trainer, threads)
            for name in [name for name, child in children.items() if child.poll() is not None]:
                code = children.pop(name).returncode
                if code == 0 and read_summary(out, name) is not None:
                    finished.add(name)
                else:
                    failures[name] = _reason(out, name, code)
                    print(f"{name} failed: {failures[name]}", file=sys.stderr, flush=True)
                bar.advance(1, name)
            time.sleep(POLL_S)
    return failures


def _start(out: Path, run: Run, trainer: list[str], threads: str) -> subprocess.Popen[bytes]:
    command = [*trainer, *run.arguments(out)]
    record = {"settings": run.settings(), "command": shlex.join(command)}
    logs = out / "logs"
    with blaming(logs, "free some space, and run the same command again"):
        write_atomically(_record(out, run), json.dumps(record, indent=2) + "\n")
        printed, complained = (logs / f"{run.name}.{end}" for end in ("out", "err"))
        # What it printed before an interruption stays; the last line of .err is this attempt's.
        with printed.open("ab") as stdout, complained.open("wb") as stderr:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": threads},
                start_new_session=True,  # a process group of its own, out of reach of ctrl-C
            )


@contextmanager
def stopped_on_error() -> Iterator[Children]:
    """The runs in progress; those still there at the end of the block are stopped, and waited for.

    A second ctrl-C, or `GRACE_S`, ends the wait: they are killed.
    """
    children: Children = {}
    try:
        yield children
    finally:
        try:
            _signal_groups(children, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while any(c.poll() is None for c in children.values()) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        finally:
            _signal_groups(children, signal.SIGKILL)  # what a leader may have left behind, too
            for child in children.values():
                child.wait()


def _signal_groups(children: Children, number: signal.Signals) -> None:
    for child in children.values():
        with suppress(
            ProcessLookupError, PermissionError
        ):  # gone; macOS says the latter of zombies
            os.killpg(child.pid, number)


def _reason(out: Path, name: str, code: int) -> str:
    """How a run failed: the last line that it wrote to stderr, or else how it ended."""
    file = out / "logs" / f"{name}.err"
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; see {file}"
    said = lines[-1].strip() if lines else "said nothing on stderr"
    if code == 0:
        return f"ended before its summary.json was written ({said})"
    return f"{said} (exit code {code}; {file})"


def _record(out: Path, run: Run) -> Path:
    return out / "logs" / f"{run.name}.json"
