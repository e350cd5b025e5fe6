"""Tokens per second of sampling and of training the embedded model, on this machine.

    python bench/speed.py

Ratios between machines or commits need both measured side by side; one run is noisy.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cfs.assets import TINYWORLD_DIR
from cfs.data import tinyworld
from cfs.data.formats import Example, make_example, make_examples
from cfs.data.mixture import Mixture
from cfs.data.tokenizer import Tokenizer
from cfs.model import load_model
from cfs.ranks import Ranks
from cfs.sample.sampler import Request, SamplingSettings, generate
from cfs.train.config import TrainConfig
from cfs.train.loop import train

REPEATS, BATCH_SIZE = 3, 128


def sampling_speed(num_slots: int, num_samples: int = 1024) -> tuple[float, list[Example]]:
    """Generated tokens per second, and the samples."""
    model, tokenizer = load_model(TINYWORLD_DIR), Tokenizer(TINYWORLD_DIR)
    requests = [Request(i, [tokenizer.seed_id]) for i in range(num_samples)]
    settings = SamplingSettings(max_tokens=127)
    started = time.perf_counter()
    samples = list(
        generate(model, requests, settings, tokenizer.eos_id, tokenizer.num_tokens, num_slots)
    )
    elapsed = time.perf_counter() - started
    tokens = sum(len(s.logprob_model) for s in samples)
    return tokens / elapsed, [make_example(s.input_ids, 1) for s in samples]


def training_speed(synthetic: list[Example], steps: int = 15) -> float:
    """Real tokens per second of gradient steps on a 1:1 mixture, padding not counted."""
    model, tokenizer = load_model(TINYWORLD_DIR), Tokenizer(TINYWORLD_DIR)
    records = [(i.prompt, f" {i.answer}") for i in tinyworld.task_items(len(synthetic), seed=0)]
    mixture = Mixture(make_examples(records, tokenizer, 128), synthetic, BATCH_SIZE, seed=0)
    config = (
        TrainConfig(steps=steps, batch_size=BATCH_SIZE)
        .resolved("cpu", context=256)
        .counted(len(synthetic))
    )
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    tokens = sum(len(d.example.input_ids) for k in range(steps) for d in mixture.batch(k))
    with tempfile.TemporaryDirectory() as directory:
        result = train(model, mixture, None, config, alone, Path(directory) / "metrics.jsonl")
    return tokens / result.train_seconds


def main() -> None:
    rows: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for num_slots in (1, 32, 256):
            speed, synthetic = sampling_speed(num_slots, 64 if num_slots == 1 else 1024)
            rows.setdefault(f"sample, {num_slots} slots", []).append(speed)
        rows.setdefault("train, batch 128, 1:1 mixture", []).append(training_speed(synthetic))
    table = Table(
        title=f"TinyWorld, float32, {torch.get_num_threads()} threads", title_justify="left"
    )
    for column in ("what", "tokens/s", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, speeds in rows.items():
        median = sorted(speeds)[REPEATS // 2]
        table.add_row(what, *(f"{s:,.0f}" for s in (median, min(speeds), max(speeds))))
    Console().print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
