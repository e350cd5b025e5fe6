"""What a step of each method takes beside one of plain fine-tuning, on this machine.

    python bench/methods.py                 # TinyWorld's shape, every method in turn
    python bench/methods.py --rounds 40

One process holds a run of each method and takes a step of each in turn, round after round, so that
a slow moment of the machine meets them all; the ratio is taken within a round. Seconds are those of
the processor in one thread, which others on the machine do not take. Texts are TinyWorld's
own, and its pretraining text stands for samples, which are as long. What comes before training
(samples, Fisher information, a first run) is not in a step; memory is what `--plan` foresees for
training. `cs`, `replay` and `ssr` take what `cfs` does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from models import columns
from rich.console import Console

from cfs.assets import TINYWORLD_DIR
from cfs.data import tinyworld
from cfs.data.formats import FORMATS, Example, make_examples
from cfs.data.mixture import Source
from cfs.data.tokenizer import Tokenizer
from cfs.model import load_model, read_config, save_model
from cfs.model.weights import checkpoint_dtype
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.footprint import training_bytes
from cfs.train.loop import Run, take_step
from cfs.train.prepare import prepared_run
from cfs.train.stopping import StopRequest

ALONE = Ranks(0, 1, torch.device("cpu"))
EXAMPLES = 512
METHODS: dict[str, dict[str, Any]] = {
    "ft": {},
    "cfs": {},
    "flow": {},
    "l2": {},
    "l2-init": {},
    "ewc": {"fisher_samples": 64},
    "sfa": {"sfa_every": 0.001},
    "mofo": {},
    "lota": {},
    "hma": {},
    "lora": {"lora_rank": 16},
    "freeze": {},
    "distill": {},
}
"""`sfa` averages after every step here, and after a few of a run otherwise."""


def documents(count: int, seed: int) -> list[Example]:
    """Pretraining text, every token a target, as a sample's are."""
    records = [("", text) for text in tinyworld.pretraining_documents(count, seed)]
    return make_examples(records, Tokenizer(TINYWORLD_DIR), 128, all_tokens=True)


def task() -> list[Example]:
    records = [FORMATS["tinyworld"](asdict(item)) for item in tinyworld.task_items(EXAMPLES, 0)]
    return make_examples(records, Tokenizer(TINYWORLD_DIR), 128)


def tuned_model(place: Path) -> Path:
    """The base moved a little: what fine-tuning would have given."""
    model, generator = load_model(TINYWORLD_DIR), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_model(model, place)
    return place


def method_run(name: str, place: Path, rounds: int) -> Run:
    tuned = [str(place / "tuned")] if name in ("lota", "hma") else None
    config = TrainConfig(
        method=name, steps=max(1000, rounds), tuned=tuned, kl_samples=0, **METHODS[name]
    )
    config = config.resolved("cpu", 256).counted(EXAMPLES)
    sources = [Source("record", task())]
    if name == "cfs":
        sources.append(Source("document", documents(EXAMPLES, 0), synthetic=True))
    out = place / name
    out.mkdir()
    run = prepared_run(config, TINYWORLD_DIR, sources, None, out, ALONE, documents(64, 1))
    if name == "flow":
        weights = torch.linspace(0.1, 1.0, EXAMPLES).numpy()
        run.mixture = replace(run.mixture, sources=[replace(sources[0], weights=weights)])
    run.checkpoints = None
    return run


def timed_step(run: Run, step: int) -> float:
    started = time.process_time()
    take_step(run, step, StopRequest())
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of each, after three more")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    table = columns(
        f"A step beside plain fine-tuning's: {rounds} rounds, one thread",
        ("method", "CPU s/step", "ratio (median)", "lowest", "highest", "planned memory, ratio"),
    )
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tuned_model(place / "tuned")
        runs = {name: method_run(name, place, rounds) for name in METHODS}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for step in range(rounds + 3):
            for name, run in runs.items():
                seconds = timed_step(run, step)
                if step >= 3:
                    times[name].append(seconds)
        model, stored = read_config(TINYWORLD_DIR), checkpoint_dtype(TINYWORLD_DIR)
        memory = {
            name: training_bytes(run.config, model, stored, 1, "cpu") for name, run in runs.items()
        }
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["ft"], strict=True)]
        table.add_row(
            name, f"{statistics.median(own):.3f}",
            *(f"{x:.2f}" for x in (statistics.median(ratios), min(ratios), max(ratios))),
            f"{memory[name] / memory['ft']:.2f}",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
