"""What `bench/train.py` measures in processes of their own, so that a peak belongs to one side.

    python bench/train_runs.py trainer '{"place": "...", "steps": 4, ...}'

prints one line of JSON. Libraries are imported by the side that needs them, for the same reason.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

LR, BETA2, CLIP, BATCH_SIZE = 1e-3, 0.999, 1.0, 32
EXAMPLES, ORDER, MODEL = "examples.npz", "order.npy", "model"
"""Files in the place that `bench/train.py` prepares: all examples; those of each step; weights."""
HEAD_VOCABULARY, HEAD_WIDTH = 128_256, 1024
MIB = 2**20


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process. Linux alone."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None, f"/proc/self/status has {field}"
    return 1024 * int(found[1])


def read_examples(place: Path) -> list[tuple[np.ndarray, int]]:
    """(input_ids (T,) int64, first target) of each example."""
    saved = np.load(place / EXAMPLES)
    rows = np.split(saved["input_ids"], np.cumsum(saved["lengths"])[:-1])
    return list(zip(rows, saved["first_targets"].tolist(), strict=True))


def num_tokens(examples: list[tuple[np.ndarray, int]]) -> int:
    """Prompts and targets, no padding."""
    return sum(len(ids) for ids, _ in examples)


# ----------------------------------------------------------------------------- the two sides


def trainer(place: str, steps: int, dtype: str, micro_batch: int, grouped: bool) -> dict[str, Any]:
    """`transformers` Trainer over the first `steps` batches of the order.

    grouped  over batches of like lengths instead, as its group_by_length makes them
    """
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    examples = read_examples(Path(place))
    if grouped:
        rows = grouped_examples(examples, steps)
    else:
        rows = [examples[i] for i in np.load(Path(place) / ORDER)[: steps * BATCH_SIZE]]
    dataset = [{"input_ids": ids, "first_target": first} for ids, first in rows]
    losses: list[float] = []
    times: list[tuple[float, float]] = []

    class Notes(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any, **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    model = AutoModelForCausalLM.from_pretrained(
        Path(place) / MODEL, dtype=torch.float32, attn_implementation="sdpa"
    )
    arguments = TrainingArguments(
        output_dir=f"{place}/trainer",
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH_SIZE // micro_batch,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta2=BETA2,
        max_grad_norm=CLIP,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,  # type: ignore[arg-type]
        data_collator=padded,
        callbacks=[Notes()],
    ).train()
    (started, cpu_started), (ended, cpu_ended) = times
    return {
        "seconds": ended - started,
        "cpu_seconds": cpu_ended - cpu_started,
        "tokens": num_tokens(rows),
        "losses": losses,
    }


def grouped_examples(
    examples: list[tuple[np.ndarray, int]], steps: int
) -> list[tuple[np.ndarray, int]]:
    """`steps` batches of an epoch that is grouped by length: one of each quantile of size."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [len(ids) for ids, _ in examples]
    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(BATCH_SIZE, lengths=lengths, generator=generator))
    batches = [
        [examples[i] for i in order[first : first + BATCH_SIZE]]
        for first in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)
    ]
    batches.sort(key=num_tokens)
    places = [int((k + 0.5) / steps * len(batches)) for k in range(steps)]
    return [example for place in places for example in batches[place]]


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest of them; prompts and padding are no targets."""
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids, first = torch.from_numpy(row["input_ids"]), row["first_target"]
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, first : len(ids)] = ids[first:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def ours(place: str, steps: int, dtype: str, micro_batch_tokens: int) -> dict[str, Any]:
    """The same steps by `cfs.train.loop.train` on a run as `train.py` prepares it."""
    from cfs.train.loop import train

    run = prepared(Path(place), f"cfs-{os.getpid()}", steps, dtype, micro_batch_tokens)
    started, cpu_started = time.perf_counter(), time.process_time()
    train(run)
    ended, cpu_ended = time.perf_counter(), time.process_time()
    assert run.metrics is not None, "a lone process writes the metrics"
    lines = run.metrics.file.read_text().splitlines()
    draws = [draw for step in range(steps) for draw in run.mixture.batch(step)]
    return {
        "seconds": ended - started,
        "cpu_seconds": cpu_ended - cpu_started,
        "tokens": sum(len(draw.example.input_ids) for draw in draws),
        "losses": [json.loads(line)["loss"] for line in lines],
    }


def prepared(
    place: Path, name: str, steps: int, dtype: str, micro_batch_tokens: int, **flags: Any
) -> Any:
    """A `cfs.train.loop.Run` over the examples of `place`, which writes to `place/name`."""
    from cfs.data.formats import make_example
    from cfs.data.mixture import Source
    from cfs.ranks import Ranks
    from cfs.train.config import TrainConfig
    from cfs.train.prepare import prepared_run

    examples = [make_example(ids, first) for ids, first in read_examples(place)]
    given: dict[str, Any] = {
        "method": "ft",
        "model": str(place / MODEL),
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "beta2": BETA2,
        "warmup": 0.0,
        "clip": CLIP,
        "optimizer": "adamw",
        "dtype": dtype,
        "micro_batch_tokens": micro_batch_tokens,
    }
    config = TrainConfig(**(given | flags)).resolved("cpu", context=2048).counted(len(examples))
    out = place / name
    out.mkdir()
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    source = Source("example", examples)
    run = prepared_run(config, place / MODEL, [source], None, out, alone)
    run.checkpoints = None  # the Trainer writes none either
    return run


# --------------------------------------------------------------------------------- the head


def head(kind: str, num_targets: int, dtype: str) -> dict[str, Any]:
    """Loss and head alone, forward and backward: memory beyond their inputs, gradients counted."""
    import torch.nn.functional as F

    from cfs.model.logprobs import chunked_logprobs, plain_logprobs

    generator = torch.Generator().manual_seed(0)
    numbers = {"generator": generator, "dtype": getattr(torch, dtype)}
    hidden = torch.randn(num_targets, HEAD_WIDTH, **numbers).requires_grad_()
    weight = torch.randn(HEAD_VOCABULARY, HEAD_WIDTH, **numbers).mul_(0.02).requires_grad_()
    targets = torch.randint(HEAD_VOCABULARY, (num_targets,), generator=generator)
    grad = torch.full((num_targets,), -1 / num_targets)
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    if kind == "cfs":
        chunked_logprobs(hidden, weight, targets).backward(grad)
    elif kind == "cfs, gradient known ahead":
        chunked_logprobs(hidden, weight, targets, grad_hint=grad).backward(grad)
    elif kind == "plain":
        plain_logprobs(hidden, weight, targets).backward(grad)
    else:
        options = torch.nn.LinearCrossEntropyOptions()
        F.linear_cross_entropy(hidden, weight, targets, options=options).backward()
    return {
        "seconds": time.perf_counter() - started,
        "mib": (resident_bytes("VmHWM") - before) / MIB,
    }


RUNS = {"trainer": trainer, "cfs": ours, "head": head}


def main() -> None:
    name, arguments = sys.argv[1:]
    result = RUNS[name](**json.loads(arguments))
    print(json.dumps(result | {"peak_mib": resident_bytes("VmHWM") / MIB}), flush=True)
    os._exit(0)  # gloo's threads would outlive the interpreter (`cfs.cli.leave`)


if __name__ == "__main__":
    main()
