"""Training killed at random moments and resumed, against an uninterrupted run.

    python bench/kill_train.py --kills 60

Runs of `train.py --resume` on one and on two ranks are killed with SIGKILL while they start,
train, save a checkpoint or write the result. After each kill the checkpoints must be whole, and the
newest at most one interval behind the last step that was logged, or two where the one after it was
still being written; each finished run must have the weights and metrics of an uninterrupted one,
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cfs.data import tinyworld
from cfs.files import sha256
from cfs.train.metrics import CLOCKED

TRAIN = Path(__file__).parent.parent / "train.py"
STEPS, SAVE_EVERY, BATCH_SIZE = 40, 4, 16
MOMENTS = ("start-up", "training", "saving", "result")
WEIGHTS = (2, 4, 6, 1)
LONGEST_WAIT_S = {"start-up": 4.0, "training": 0.3, "saving": 0.03, "result": 0.05}


def start(out: Path, data: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(TRAIN), "--resume", "--out", str(out), "--data", str(data)]
    command += ["--format", "tinyworld", "--method", "ft", "--steps", str(STEPS), "--keep", "2"]
    command += ["--save-every", str(SAVE_EVERY), "--batch-size", str(BATCH_SIZE)]
    command += ["--kl-samples", "16", "--corpora", str(data.parent / "corpora"), "--device", "cpu"]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(out.parent / f"{out.name}.err").open("wb"),
    )


def has_come(moment: str, out: Path, lines_before: int) -> bool:
    """Is the run where `moment` begins?"""
    if moment == "start-up":
        return True
    if moment == "training":
        return num_lines(out) > lines_before
    if moment == "saving":
        return any((out / "checkpoints").glob(".step-*"))
    return any(out.glob(".model*"))


def num_lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def kill_at(moment: str, process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> bool:
    """Kill every rank at `moment`; False where the run ended before it came."""
    lines_before, due = num_lines(out), None
    while process.poll() is None:
        if due is None and has_come(moment, out, lines_before):
            due = time.monotonic() + rng.uniform(0, LONGEST_WAIT_S[moment])
        if due is not None and time.monotonic() >= due:
            while pids := processes_of(out):
                for pid in pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


def processes_of(out: Path) -> list[int]:
    """torchrun and its ranks, which outlive it: every process that was started for `out`."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"{out}\0".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def after_kill(out: Path) -> tuple[list[str], int]:
    """What is wrong with the checkpoints of a run that was killed, and the steps that it lost."""
    faults: list[str] = []
    paths = sorted((out / "checkpoints").glob("step-*"))
    for path in paths:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            if sha256(path / name) != entry["sha256"]:
                faults.append(f"{path.name}/{name} is damaged")
    logged = max((line["step"] for line in metrics(out)), default=0)
    newest = int(paths[-1].name.removeprefix("step-")) if paths else 0
    # Steps go on while the checkpoint before them is being written, until the next is due.
    if logged - newest > 2 * SAVE_EVERY:
        faults.append(f"step {logged} was logged, the newest checkpoint is of step {newest}")
    return faults, logged - newest


def metrics(out: Path) -> list[dict[str, float]]:
    file = out / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]


def run_to_end(out: Path, data: Path, ranks: int) -> None:
    process = start(out, data, ranks)
    if process.wait():
        raise SystemExit((out.parent / f"{out.name}.err").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        report(Path(place), arguments.kills, rng)


def report(place: Path, kills: int, rng: random.Random) -> None:
    data = place / "task.jsonl"
    items = tinyworld.task_items(400, 0)
    data.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    expected = {}
    for ranks in (1, 2):
        run_to_end(place / f"whole-{ranks}", data, ranks)
        expected[ranks] = place / f"whole-{ranks}"

    counts: Counter[tuple[int, str]] = Counter()
    faults: list[str] = []
    lost: list[int] = []
    number = finished = 0
    while sum(counts.values()) < kills:
        number += 1
        ranks = 1 + number % 2
        out = place / f"killed-{number}"
        while not (out / "summary.json").is_file():
            moment = rng.choices(MOMENTS, WEIGHTS)[0]
            process = start(out, data, ranks)
            if sum(counts.values()) >= kills:
                process.wait()
            elif kill_at(moment, process, out, rng):
                counts[ranks, moment] += 1
                found, num_lost = after_kill(out)
                faults += [f"{out.name}: {fault}" for fault in found]
                lost.append(num_lost)
            if process.returncode not in (0, -signal.SIGKILL):
                raise SystemExit((out.parent / f"{out.name}.err").read_text())
        finished += 1
        whole = expected[ranks]
        if metrics(out) != metrics(whole):
            faults.append(f"{out.name}: its metrics differ from the uninterrupted run's")
        if sha256(out / "model" / "model.safetensors") != sha256(
            whole / "model" / "model.safetensors"
        ):
            faults.append(f"{out.name}: its weights differ from the uninterrupted run's")

    table = Table("ranks", *MOMENTS, "all", title="kills by moment", title_justify="left")
    for ranks in (1, 2):
        row = [counts[ranks, moment] for moment in MOMENTS]
        table.add_row(str(ranks), *map(str, row), str(sum(row)))
    Console().print(table)
    print(f"{finished} runs of {STEPS} steps finished after {sum(counts.values())} kills")
    beyond = sum(steps > SAVE_EVERY for steps in lost)
    print(
        f"checkpoints every {SAVE_EVERY} steps; a kill lost {max(lost, default=0)} steps at most, "
        f"more than one interval {beyond} times"
    )
    print(f"{len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
