"""The sampler as `generate.py` runs it: exactness, ranks and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers
from models import SHAPES, columns, random_model
from rich.console import Console

from cfs.model import save_model
from cfs.sample.corpus import read_corpus

ROOT = Path(__file__).parent.parent
MAX_TOKENS = 256


def exact(console: Console) -> None:
    """2,000 TinyWorld samples drawn several ways: how many differ from those of 256 slots?"""
    table = columns(
        "TinyWorld, float32: of 2,000 samples, those that depend on how they are drawn",
        ("how", "differing samples", "largest difference of a stored log-probability"),
    )
    ways = {"1 rank, 256 slots": (1, 256), "1 rank, 64 slots": (1, 64), "1 rank, 7 slots": (1, 7),
            "1 rank, 1 slot": (1, 1), "2 ranks, 64 slots": (2, 64)}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        expected: list[Any] = []
        for name, (ranks, slots) in ways.items():
            out = Path(directory) / name.replace(" ", "-")
            generate_command(ranks, out, "--num-samples", "2000", "--batch-size", str(slots))
            samples = read_corpus(out).samples
            expected = expected or samples
            pairs = list(zip(expected, samples, strict=True))
            same = [(x, y) for x, y in pairs if x.input_ids.tolist() == y.input_ids.tolist()]
            largest = max(float(np.abs(x.logprob_model - y.logprob_model).max()) for x, y in same)
            table.add_row(name, str(len(pairs) - len(same)), f"{largest:.1e}")
    console.print(table)


def generate_command(ranks: int, out: Path, *flags: str, threads: int = 0) -> tuple[float, int]:
    """Run generate.py; seconds, and peak resident memory of the largest process in bytes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(ROOT / "generate.py")]
    cores = os.cpu_count() or 1
    env = {**os.environ, "OMP_NUM_THREADS": str(threads or max(1, cores // ranks))}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--out", str(out), *flags], env=env, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"generate.py ended with status {status}")
    return time.perf_counter() - started, 1024 * usage.ru_maxrss


def tokens_in(out: Path) -> int:
    """Generated tokens of a corpus, counted without holding it."""
    columns = (pq.read_table(file)["logprob_model"] for file in out.glob("part-*.parquet"))
    return sum(len(chunk.values) for column in columns for chunk in column.chunks)


def ranks_on_cores(console: Console) -> None:
    """One process with a thread a core, and a process a core, in turn; starting included."""
    table = columns(
        "olmo-50304, 512 samples by generate.py: processes against threads",
        ("how", "seconds", "tokens/s", "ratio"),
    )
    cores = os.cpu_count() or 1
    times: dict[int, list[float]] = {1: [], cores: []}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        save_model(random_model("olmo-50304"), model)
        write_tokenizer(model, SHAPES["olmo-50304"]["vocab_size"])
        flags = ("--model", str(model), "--num-samples", "512", "--max-tokens", str(MAX_TOKENS))
        tokens = 0
        for repeat in range(2):
            for ranks in times:
                out = Path(directory) / f"{ranks}-{repeat}"
                times[ranks].append(generate_command(ranks, out, *flags)[0])
                tokens = tokens_in(out)
    reference = min(times[1])
    for ranks, seconds in times.items():
        name = f"{ranks} x {cores // ranks} thread{'s' if cores > ranks else ''}"
        best = min(seconds)
        table.add_row(name, f"{best:.1f}", f"{tokens / best:,.0f}", f"{reference / best:.2f}")
    console.print(table)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer of numbered words, as generate.py wants one."""
    words = {f"w{i}": i for i in range(vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    backend.save(str(directory / "tokenizer.json"))


def memory(console: Console, counts: list[int]) -> None:
    """Peak resident memory and speed of generate.py over the number of TinyWorld samples."""
    table = columns(
        "TinyWorld by generate.py: cost is linear in the number of samples, memory flat",
        ("samples", "tokens", "seconds", "tokens/s", "peak memory (MiB)"),
    )
    with tempfile.TemporaryDirectory() as directory:
        for count in counts:
            out = Path(directory) / str(count)
            seconds, peak = generate_command(1, out, "--num-samples", str(count))
            tokens = tokens_in(out)
            table.add_row(
                f"{count:,}", f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}",
                f"{peak / 2**20:,.0f}",
            )  # fmt: skip
    console.print(table)
