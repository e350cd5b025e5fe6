"""Short training runs of a tiny model, set up as `train.py` sets them up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfs.data.formats import Example, make_example
from cfs.data.mixture import Source
from cfs.model import load_model, save_model
from cfs.ranks import Ranks
from cfs.train.config import TrainConfig
from cfs.train.kl import HeldOutSamples
from cfs.train.loop import Run
from cfs.train.parallel import full_parameters
from cfs.train.prepare import prepared_run
from tests.conftest import ALONE, tiny_model

STEPS, BATCH_SIZE = 20, 8
"""Three batches are an epoch."""


def base_model(place: Path) -> Path:
    """Its matrices hold 4,096 elements or more, so that they get 8-bit states."""
    path = place / "base"
    if not path.is_dir():
        model = tiny_model("olmo", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
        save_model(model, path)
    return path


def tuned_model(place: Path) -> Path:
    """The base moved a little, as by fine-tuning."""
    path = place / "tuned"
    if not path.is_dir():
        model = load_model(base_model(place))
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        save_model(model, path)
    return path


def random_examples(count: int, seed: int, first_target: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [
        make_example([0, *generator.integers(1, 96, length)], first_target, number)
        for number, length in enumerate(generator.integers(6, 24, count), start=1)
    ]


def make_run(
    place: Path,
    name: str,
    ranks: Ranks = ALONE,
    base: Path | None = None,
    task: list[Example] | None = None,
    **changes: object,
) -> Run:
    """A run in `place/name`, set back to its newest checkpoint where it has one."""
    base = base or base_model(place)
    flags: dict[str, object] = {
        "model": str(base),
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "lr": 1e-3,
        "save_every": 4,
        "kl_every": 5,
        "l2": 1e-2,
        "weight_decay": 0.1,
        "micro_batch_tokens": 64,
        "optimizer": "adamw",
    }
    config = TrainConfig(**(flags | changes))  # type: ignore[arg-type]
    config = replace(config.resolved("cpu", 128), dtype=config.dtype or "float32").counted(16)
    out = place / name
    out.mkdir(exist_ok=True)
    sources = [
        Source("task.jsonl record", task or random_examples(16, 1, 4)),
        Source("sample", random_examples(8, 2, 1), synthetic=True),
    ]
    held_out = HeldOutSamples(random_examples(6, 3, 1), np.zeros(6))
    fisher = random_examples(16, 4, 1)
    return prepared_run(config, base, sources, held_out, out, ranks, fisher)


def weights(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in full_parameters(run.model)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
