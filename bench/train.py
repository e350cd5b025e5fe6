"""Training's speed and memory, as ratios within one run.

    python bench/train.py                    everything that this machine can show
    python bench/train.py --only compare kl  some of the tables

compare    real (non-padding) tokens/s and peak memory beside the `transformers` Trainer
head       peak memory of loss and head over the number of targets, vocabulary 128,256
l2         a step with the penalty towards theta* beside one without
kl         share of a run that the KL estimates take
optimizer  AdamW with float32 states beside 8-bit ones
gpu        OLMo-1B and Llama-8B shapes on CUDA; "not measured" without it

On a CPU the model is a random OLMo with OLMo-1B's vocabulary; the examples are real, MetaMathQA
and GSM8K from ../shared/data. Each figure of memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import columns, config_of
from rich.console import Console
from rich.table import Table
from train_gpu import gpu
from train_parts import kl, l2, optimizer
from train_runs import BATCH_SIZE, EXAMPLES, HEAD_VOCABULARY, HEAD_WIDTH, MODEL, ORDER

from cfs.cli import run
from cfs.data.formats import Example, make_examples, read_records
from cfs.data.mixture import Mixture, Source
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import build_model, save_model
from cfs.model.config import parse_config
from cfs.train.optim import init_weights

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
RUNS = Path(__file__).parent / "train_runs.py"
SHAPE, MAX_LENGTH, AGREEING_STEPS = "olmo-50304", 512, 20
TRAINER_ROWS, GROUPED = (4, 8, 16), ", grouped by length"
MICRO_BATCH_TOKENS = (512, 1024, 2048, 4096)
TARGETS = (512, 1024, 2048, 4096, 8192)
PLAIN_COPIES = 5
"""Float32 logits that plain loss and head may hold at a time, with one to spare."""
HEADS = ("cfs", "cfs, gradient known ahead", "torch linear_cross_entropy", "plain")


def prepare(place: Path) -> int:
    """Write the model, the examples and their order to `place`; returns the parameters' number."""
    if not SHARED_DATA.is_dir():
        raise UserError(f"{SHARED_DATA}: not there; --only head, optimizer and gpu need no data")
    folder = place / "tokenizer"
    folder.mkdir()
    source = SHARED_DATA / "tokenizer_olmo1b" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer(folder)
    files = {
        "metamathqa_sample/metamathqa_val_dataset.jsonl": "messages",
        "gsm8k/train.jsonl": "gsm8k",
    }
    examples: list[Example] = []
    for file, format_name in files.items():
        records = read_records(SHARED_DATA / file, format_name)
        examples += make_examples(records, tokenizer, MAX_LENGTH)
    np.savez(
        place / EXAMPLES,
        input_ids=np.concatenate([example.input_ids for example in examples]),
        lengths=np.array([len(example.input_ids) for example in examples]),
        first_targets=np.array([int(example.target_mask.argmax()) for example in examples]),
    )
    numbers = {id(example): number for number, example in enumerate(examples)}
    mixture = Mixture([Source("example", examples)], BATCH_SIZE, seed=0)
    batches = [mixture.batch(step) for step in range(len(examples) // BATCH_SIZE)]
    order = np.array([numbers[id(draw.example)] for batch in batches for draw in batch])
    np.save(place / ORDER, order)
    # Tied, as OLMo-1B's are.
    model = build_model(parse_config(config_of(SHAPE) | {"tie_word_embeddings": True}))
    init_weights(model, seed=0)
    save_model(model, place / MODEL)
    return sum(p.numel() for p in model.parameters())


def alone(name: str, **arguments: Any) -> dict[str, Any]:
    """What `train_runs.py` measures in a process of its own."""
    command = [sys.executable, str(RUNS), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} {arguments}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------- compare


def compare(console: Console, place: Path, arguments: argparse.Namespace) -> None:
    """Rows take turns, `--repeats` times."""
    for dtype in arguments.dtypes:
        agreement(console, place, dtype)
        settings: dict[str, tuple[str, dict[str, Any]]] = {}
        for grouped, rows in itertools.product((False, True), TRAINER_ROWS):
            name = f"Trainer, {rows} rows" + (GROUPED if grouped else "")
            settings[name] = ("trainer", {"micro_batch": rows, "grouped": grouped})
        for tokens in MICRO_BATCH_TOKENS:
            settings[f"cfs, {tokens} tokens"] = ("cfs", {"micro_batch_tokens": tokens})
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
        for _ in range(arguments.repeats):
            for name, (side, how) in settings.items():
                results[name].append(
                    alone(side, place=str(place), steps=arguments.steps, dtype=dtype, **how)
                )
        console.print(comparison(results, dtype, arguments))


def comparison(
    results: dict[str, list[dict[str, Any]]], dtype: str, arguments: argparse.Namespace
) -> Table:
    """Speeds and peaks of all rows, and as ratios to two of the Trainer's: the fastest one over
    shuffled examples, which is the work that cfs does, and the fastest one of all.
    """
    speeds = {
        name: [one["tokens"] / one["seconds"] for one in runs] for name, runs in results.items()
    }
    medians = {name: statistics.median(own) for name, own in speeds.items()}
    peaks = {name: max(one["peak_mib"] for one in runs) for name, runs in results.items()}
    theirs = [name for name in results if name.startswith("Trainer")]
    shuffled = max((n for n in theirs if not n.endswith(GROUPED)), key=medians.__getitem__)
    fastest = max(theirs, key=medians.__getitem__)
    table = columns(
        f"Fine-tuning beside transformers Trainer, {dtype}: {arguments.repeats} runs of "
        f"{arguments.steps} batches of {BATCH_SIZE}\n"
        f"a: to {shuffled}; b: to {fastest}",
        ("what", "tokens/s", "lowest", "highest", "CPU s", "a", "b", "peak MiB", "a", "b"),
    )
    for name, runs in results.items():
        cpu = statistics.median(one["cpu_seconds"] for one in runs)
        table.add_row(
            name,
            *(f"{x:,.0f}" for x in (medians[name], min(speeds[name]), max(speeds[name]), cpu)),
            *(f"{medians[name] / medians[base]:.2f}" for base in (shuffled, fastest)),
            f"{peaks[name]:,.0f}",
            *(f"{peaks[name] / peaks[base]:.2f}" for base in (shuffled, fastest)),
        )
    return table


def agreement(console: Console, place: Path, dtype: str) -> None:
    """Do both do the same work? Their losses over the first steps, batch by batch."""
    common = {"place": str(place), "steps": AGREEING_STEPS, "dtype": dtype}
    theirs = alone("trainer", micro_batch=8, grouped=False, **common)
    mine = alone("cfs", micro_batch_tokens=2048, **common)
    losses = mine["losses"]
    largest = max(abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True))
    console.print(
        f"{dtype}: the losses of {AGREEING_STEPS} steps, from {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"differ from the Trainer's by at most {largest:.1e}; peaks {mine['peak_mib']:,.0f} MiB at "
        f"2048 tokens, the Trainer's {theirs['peak_mib']:,.0f} MiB at 8 rows"
    )


# ---------------------------------------------------------------------------------------- head


def head(console: Console) -> None:
    """Both gradients are counted, of which the weight's does not depend on the targets."""
    table = columns(
        f"Peak memory of loss and head in MiB, vocabulary {HEAD_VOCABULARY:,}, width {HEAD_WIDTH}, "
        "float32",
        ("targets", *(f"{n:,}" for n in TARGETS)),
    )
    for kind in HEADS:
        table.add_row(kind, *(head_peak(kind, num_targets) for num_targets in TARGETS))
    console.print(table)


def head_peak(kind: str, num_targets: int) -> str:
    """A cell of the table: MiB, or why there are none."""
    if kind.startswith("torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "not in this torch"
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if kind == "plain" and PLAIN_COPIES * 4 * num_targets * HEAD_VOCABULARY > free_bytes:
        return "no room"
    found = alone("head", kind=kind, num_targets=num_targets, dtype="float32")
    return f"{found['mib']:,.0f}"


TABLES: dict[str, Callable[..., None]] = {
    "compare": compare,
    "head": head,
    "l2": l2,
    "kl": kl,
    "optimizer": optimizer,
    "gpu": gpu,
}
NEED_PLACE = ("compare", "l2", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--steps", type=int, default=4, help="of each run of compare")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row of compare")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of compare")
    arguments = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if any(name in NEED_PLACE for name in arguments.only):
            millions = prepare(place) / 1e6
            console.print(f"A random OLMo of {millions:.1f} million parameters")
        for name in arguments.only:
            extra = (place, arguments) if name == "compare" else (place,)
            TABLES[name](console, *(extra if name in NEED_PLACE else ()))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    run(main)
