"""A script of a few lines in the place of train.py, and reproduce.py called within the process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import reproduce
from cfs import cli
from cfs.eval import study_runs

# Takes the flags of train.py that a study gives, and three of its own to misbehave by.
FAKE_TRAINER = """
import argparse, json, os, signal, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("method", "seed", "out", "corpora", "tuned", "lam", "steps", "fail", "sleep"):
    parser.add_argument("--" + name)
parser.add_argument("--resume", action="store_true")
flags = parser.parse_args()
if flags.fail:
    print("Traceback", file=sys.stderr)
    sys.exit(flags.fail)
out = Path(flags.out)
out.mkdir(exist_ok=True)
if flags.tuned and not Path(flags.tuned).is_dir():
    sys.exit(f"--tuned {flags.tuned}: is not there")

def stop(*_):
    (out / "stopped").touch()
    os._exit(0)

signal.signal(signal.SIGTERM, stop)
began = time.time()
(out / "begun").touch()
if flags.sleep and not (out / "stopped").exists():
    time.sleep(float(flags.sleep))
(out / "model").mkdir()
summary = {"method": flags.method, "seed": int(flags.seed), "seconds": 60.0,
           "threads": os.environ["OMP_NUM_THREADS"], "span": [began, time.time()]}
(out / "summary.json").write_text(json.dumps(summary))
"""

ROWS: list[dict[str, Any]] = [
    {"label": "ft", "method": "ft"},
    {"label": "cfs", "method": "cfs", "sweep": {"lam": [0.5, 1]}, "headline": 1},
    {"label": "merged", "method": "merged", "needs": "cfs", "flags": {"steps": None}},
]


def write_study(directory: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    content = {"title": "A study", "scales": {"tiny": {"steps": 7}}, "baseline": "ft", "rows": rows}
    file = directory / "study.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return str(file)


def put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `reproduce` run the fake, quickly."""
    file = tmp_path / "trainer.py"
    file.write_text(FAKE_TRAINER)
    monkeypatch.setattr(reproduce, "TRAINER", [sys.executable, "-S", str(file)])
    monkeypatch.setattr(study_runs, "POLL_S", 0.01)
    monkeypatch.setattr(cli, "leave", sys.exit)


def run_reproduce(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `reproduce.py ARGUMENTS`, within this process."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (*cli.STOPPING, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as caught:
            cli.run(reproduce.main, resumes=reproduce.AGAIN)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(caught.value.code, int)
    return caught.value.code
