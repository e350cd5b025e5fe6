"""Real steps' peaks by torch's own profiler beside rehearsed ones: JSON, by case.

FSDP runs as it is, in one process: torch's fake process group sends nothing, and leaves out
gloo's copies, which the rehearsal is told to leave out too.
"""

from __future__ import annotations

import gc
import json
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from cfs.baselines import Method
from cfs.baselines.freeze import Freeze
from cfs.baselines.lora import Lora
from cfs.cli import run
from cfs.data.formats import Example
from cfs.data.mixture import Draw
from cfs.data.packing import packed_batch
from cfs.model import Decoder, build_model
from cfs.model.config import parse_config
from cfs.ranks import Ranks
from cfs.train.loss import SourceWeights, micro_batch_loss
from cfs.train.parallel import checkpoint_activations, shard, wrapped
from cfs.train.rehearsal import rehearse
from cfs.train.stand_ins import Sharding, Work
from tests.conftest import tiny_config

LENGTH = 32
# Where the activations, the head, the gathered weights or the reduction of the root is the most.
CASES: dict[str, dict[str, Any]] = {
    "float32": {"num_tokens": 256},
    "one micro-batch": {"num_tokens": 256, "accumulates": False},
    "block": {"num_tokens": 256, "checkpointing": "block"},
    "selective": {"num_tokens": 256, "checkpointing": "selective"},
    "bfloat16": {"num_tokens": 256, "compute": torch.bfloat16},
    "bfloat16 masters": {"compute": torch.bfloat16, "masters": torch.bfloat16},
    "large vocabulary": {"vocab_size": 5000, "compute": torch.bfloat16},
    "2 ranks": {"num_tokens": 256, "num_ranks": 2},
    "2 ranks, bfloat16": {"num_tokens": 256, "num_ranks": 2, "compute": torch.bfloat16},
    "2 ranks, selective": {"num_tokens": 256, "num_ranks": 2, "checkpointing": "selective"},
    "4 ranks, large vocabulary": {"vocab_size": 5000, "num_ranks": 4},
    "4 ranks, uneven rows": {"vocab_size": 5001, "num_ranks": 4, "compute": torch.bfloat16},
    "2 copies on 4 ranks": {"vocab_size": 5001, "num_ranks": 4, "num_shards": 2},
    "bfloat16 masters, 2 copies": {
        "vocab_size": 5000,
        "num_ranks": 4,
        "num_shards": 2,
        "compute": torch.bfloat16,
        "masters": torch.bfloat16,
    },
    "lora": {"num_tokens": 256, "methods": (Lora(lora_rank=8),)},
    "lora, 2 ranks": {"num_tokens": 256, "num_ranks": 2, "methods": (Lora(lora_rank=8),)},
    "lora, bfloat16": {"compute": torch.bfloat16, "methods": (Lora(lora_rank=8),)},
    "frozen embeddings": {"num_tokens": 256, "methods": (Freeze(),)},
    "frozen mlp, 2 ranks": {"num_ranks": 2, "methods": (Freeze(freeze="mlp"),)},
}


def main() -> None:
    torch.set_num_threads(1)
    Sharding._gloo_copy = lambda *_: None  # type: ignore[method-assign]
    print(json.dumps({name: peaks(**case) for name, case in CASES.items()}))


def peaks(
    vocab_size: int = 501, num_ranks: int = 1, methods: tuple[Method, ...] = (), **changes: Any
) -> tuple[int, int]:
    """Bytes, rehearsed and real."""
    if num_ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    settings = {"num_tokens": LENGTH, "accumulates": True, "num_shards": num_ranks} | changes
    work = Work(
        **{"compute": torch.float32, "masters": torch.float32, "checkpointing": "none"} | settings,
        num_ranks=num_ranks,
        document_tokens=LENGTH,
        device_type="cpu",
    )
    raw = tiny_config("llama", vocab_size=vocab_size, hidden_size=64, intermediate_size=96)
    config = parse_config(raw | {"num_hidden_layers": 4, "num_key_value_heads": 2})
    take_passes(
        sharded_model(config, work, methods), work
    )  # what is made once and kept is not the step's
    model = sharded_model(config, work, methods)
    gc.collect()  # what sharding left in cycles: freed later, it would be taken off the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_passes(model, work)
    if dist.is_initialized():
        dist.destroy_process_group()
    rehearsed = rehearse(config, work, partial(wrapped, methods=methods))
    return rehearsed.total(), peak_bytes(profiler)


def sharded_model(config: Any, work: Work, methods: tuple[Method, ...]) -> Decoder:
    model = wrapped(build_model(config), methods).to(work.masters)
    checkpoint_activations(model, work.checkpointing)
    ranks = Ranks(0, work.num_ranks, torch.device("cpu"))
    shard(model, ranks, work.compute, work.num_shards)
    return model


def take_passes(model: Decoder, work: Work) -> None:
    mask = np.arange(LENGTH) > 0
    example = Example(np.arange(LENGTH), mask)
    draws = [Draw(example, synthetic=False)] * (work.num_tokens // LENGTH)
    batch = packed_batch(draws, list(range(len(draws))))
    for _ in range(2 if work.accumulates else 1):
        micro_batch_loss(model, batch, SourceWeights(1.0, 1.0), scale=1.0).loss.backward()


def peak_bytes(profiler: Any) -> int:
    """The most that the allocator had given out at a time since the profile began."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


if __name__ == "__main__":
    run(main)
