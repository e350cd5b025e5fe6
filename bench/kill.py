"""Kill generations at random moments, resume them, and compare every row with an uninterrupted one.

    python bench/kill.py --kills 100

Each attempt runs `generate.py` on the embedded TinyWorld model, with one rank and with two in
turn, and all of its processes get SIGKILL: at a random moment of the drawing, just as a part is
being written, during start-up, or between the last part and the manifest. The next attempt goes
on with what is there. Exit code 1 where a row differs, is lost or is doubled.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from cfs.assets import TINYWORLD_DIR
from cfs.cli import option, parse, run
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import load_model
from cfs.ranks import Ranks
from cfs.sample.corpus import SETTINGS, num_parts, read_corpus
from cfs.sample.draw import Drawing, draw_corpus
from cfs.sample.prompts import Prompts
from cfs.sample.sample import SamplingSettings
from cfs.sample.settings import CorpusSettings, model_fingerprint

GENERATE = Path(__file__).resolve().parent.parent / "generate.py"
NUM_SLOTS, MAX_TOKENS = 64, 12  # short texts, so that an attempt gets some parts done
MOMENTS = {"drawing": 0.5, "writing": 0.25, "start-up": 0.15, "manifest": 0.1}
"""What an attempt waits for before it is killed, and how often."""
MOST_DRAWING_S, MOST_START_S, MOST_PARTS = 2.5, 4.0, 3
ROUNDING = 1e-4
"""Nats by which a log-probability may differ: other texts were in the batch."""


@dataclass(frozen=True)
class KillConfig:
    """Flags of `bench/kill.py`."""

    kills: int = option(100, "processes to kill, or groups of them")
    num_samples: int = option(3072, "samples of each generation")
    seed: int = option(0, "of the moments")

    def __post_init__(self) -> None:
        if self.kills < 1 or self.num_samples < 1:
            raise UserError("--kills and --num-samples: expected at least 1")


@dataclass
class Tally:
    """What happened."""

    kills: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By moment and number of ranks."""
    parts_present: list[int] = field(default_factory=list)
    generations: int = 0
    rows: int = 0
    mismatches: int = 0
    lost: int = 0
    doubled: int = 0
    leftovers: int = 0
    """Files of a finished corpus that do not belong there."""


def reference(out: Path, num_samples: int) -> None:
    """The uninterrupted corpus, drawn in this process."""
    tokenizer = Tokenizer(TINYWORLD_DIR)
    prompts = Prompts([[tokenizer.seed_id]])
    settings = CorpusSettings(
        model=model_fingerprint(TINYWORLD_DIR),
        tokenizer=tokenizer.fingerprint(),
        num_samples=num_samples,
        prompt_ids=prompts.of_sample(0),
        sampling=SamplingSettings(MAX_TOKENS),
        dtype="float32",
    )
    drawing = Drawing(load_model(TINYWORLD_DIR), tokenizer, prompts, NUM_SLOTS)
    draw_corpus(out, settings, lambda: drawing, Ranks(0, 1, torch.device("cpu")))


def attempt(out: Path, num_samples: int, num_ranks: int) -> subprocess.Popen[str]:
    """`generate.py` on the corpus, started."""
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command += [str(GENERATE), "--out", str(out), "--num-samples", str(num_samples)]
    command += ["--max-tokens", str(MAX_TOKENS), "--batch-size", str(NUM_SLOTS), "--device", "cpu"]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(
    moment: str, process: subprocess.Popen[str], out: Path, all_parts: int, rng: random.Random
) -> bool:
    """Until the moment to kill; False where the process ended by itself before it came."""
    before = names_in(out)
    began = opened_at(out)
    parts_first = rng.randrange(MOST_PARTS)
    pause = rng.uniform(0, 0.003)  # so that not every kill falls at the same line of a write
    delays = {"start-up": MOST_START_S, "drawing": MOST_DRAWING_S}
    delay = rng.uniform(0, delays[moment]) if moment in delays else pause
    due = time.monotonic() + delay if moment == "start-up" else None
    while process.poll() is None:
        if due is None:
            names = names_in(out)
            new = names - before
            is_writing = any(".part-" in name and ".tmp-" in name for name in new)
            has_come = {
                "drawing": opened_at(out) != began,
                "writing": is_writing and count_parts(new) >= parts_first,
                "manifest": count_parts(names) == all_parts,
            }
            due = time.monotonic() + delay if has_come[moment] else None
        elif time.monotonic() >= due:
            return True
        time.sleep(0.0005)
    return False


def names_in(out: Path) -> set[str]:
    return set(os.listdir(out)) if out.is_dir() else set()


def opened_at(out: Path) -> int:
    """When a run last opened the corpus; it writes the settings each time."""
    file = out / SETTINGS
    return file.stat().st_mtime_ns if file.is_file() else 0


def count_parts(names: set[str]) -> int:
    return sum(name.startswith("part-") for name in names)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and to its children, which torchrun puts into groups of their own."""
    family = [process.pid]
    for pid in family:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:  # it has just ended
            continue
        family += map(int, children.split())
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


def compare(out: Path, expected: Path, num_samples: int, tally: Tally) -> None:
    """Every row of a finished corpus with the uninterrupted one's, read as others would."""
    read_corpus(out)  # every part has the SHA-256 of the manifest
    rows, wanted = (
        [
            row
            for file in sorted(d.glob("part-*.parquet"))
            for row in pq.ParquetFile(file).read(use_threads=False).to_pylist()
        ]
        for d in (out, expected)
    )
    counts = Counter(row["index"] for row in rows)
    tally.lost += sum(counts[i] == 0 for i in range(num_samples))
    tally.doubled += sum(max(0, count - 1) for count in counts.values())
    by_index = {row["index"]: row for row in rows}
    for row in wanted:
        tally.mismatches += row["index"] in by_index and not same(by_index[row["index"]], row)
    parts = [f"part-{n:05d}.parquet" for n in range(num_parts(num_samples))]
    belonging = {"manifest.json", "settings.json", ".lock", ".drawing", *parts}
    tally.leftovers += len(names_in(out) - belonging)
    tally.generations += 1
    tally.rows += len(rows)


def same(row: dict, other: dict) -> bool:
    """Equal but for the rounding of log-probabilities."""
    for key, value in other.items():
        if key not in ("logprob_model", "logprob_sampler"):
            if row[key] != value:
                return False
        elif not np.allclose(row[key], value, rtol=0, atol=ROUNDING):
            return False
    return True


def torment(config: KillConfig, directory: Path) -> Tally:
    """Generation after generation until enough kills have happened; the last one is finished."""
    rng, tally = random.Random(config.seed), Tally()
    expected, out = directory / "uninterrupted", directory / "killed"
    reference(expected, config.num_samples)
    number = 0
    while True:
        num_ranks, number = 1 + number % 2, number + 1
        moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        enough = tally.kills.total() >= config.kills
        process = attempt(out, config.num_samples, num_ranks)
        all_parts = num_parts(config.num_samples)
        if not enough and wait_for(moment, process, out, all_parts, rng):
            kill_all(process)
            tally.kills[moment, num_ranks] += 1
            tally.parts_present.append(count_parts(names_in(out)))
            if tally.kills.total() % 10 == 0:
                print(f"{tally.kills.total()} kills, {tally.generations} generations", flush=True)
            continue
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"an attempt that was not killed failed: {errors}")
        compare(out, expected, config.num_samples, tally)
        shutil.rmtree(out)
        if enough:
            return tally


def print_tally(tally: Tally, config: KillConfig) -> None:
    """One table of the kills, one of what they did."""
    kills = Table("killed while", "1 rank", "2 ranks", title="kills", title_justify="left")
    for moment in MOMENTS:
        kills.add_row(moment, *(str(tally.kills[moment, ranks]) for ranks in (1, 2)))
    totals = [sum(n for (_, r), n in tally.kills.items() if r == ranks) for ranks in (1, 2)]
    kills.add_row("all", *map(str, totals))
    present, all_parts = tally.parts_present, num_parts(config.num_samples)
    result = Table(show_header=False)
    result.add_row("generations finished", str(tally.generations))
    result.add_row("mean parts present at a kill", f"{np.mean(present):.1f} of {all_parts}")
    result.add_row("rows compared", f"{tally.rows:,}")
    for what in ("mismatches", "lost", "doubled", "leftovers"):
        result.add_row(
            what if what != "leftovers" else "files left over", str(getattr(tally, what))
        )
    for table in (kills, result):
        for column in table.columns[1:]:
            column.justify = "right"
        Console().print(table)


def main() -> None:
    config = parse(KillConfig, "Kill generations, resume them, and compare every row.")
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        tally = torment(config, Path(directory))
    print_tally(tally, config)
    print(f"{time.monotonic() - started:.0f} s")
    if tally.mismatches or tally.lost or tally.doubled or tally.leftovers:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
