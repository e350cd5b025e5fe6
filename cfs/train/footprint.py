"""What one rank holds at the moments of a training step, in bytes by part.

What stays follows from the parameters' shapes and from the methods; the rest is rehearsed
(`rehearsal.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import torch

from cfs.model import ModelConfig, build_model
from cfs.train.config import TrainConfig
from cfs.train.eightbit import BLOCK, MIN_8BIT_ELEMENTS
from cfs.train.optim import CHUNK_ON_CPU, CHUNK_ON_DEVICE
from cfs.train.parallel import shard_rows, wrapped
from cfs.train.rehearsal import rehearse, rehearse_rounding
from cfs.train.stand_ins import GRADIENTS, Work

MASTERS, STATES, REFERENCE = "masters", "optimizer states", "theta*"
TUNED, TEACHER, COPY = "tuned models", "teacher", "copy of one parameter"
MERGE = "one parameter of each model"
CHECKPOINT, UPDATE, BASE = "checkpoint copy", "update", "base model"

UPDATE_BYTES = 16
"""For each element of the largest parameter, at most: its copy, a mean read from 8 bits, the
magnitudes by which a method chooses, and the choice."""


def training_bytes(
    config: TrainConfig,
    model_config: ModelConfig,
    stored: torch.dtype,
    num_ranks: int,
    device_type: str,
) -> int:
    """The most that one rank holds while it trains, what comes before left out."""
    num_shards = config.shard_ranks or num_ranks
    moments, _ = training_moments(config, model_config, stored, num_ranks, num_shards, device_type)
    return max(parts.total() for parts in moments.values())


def training_moments(
    config: TrainConfig,
    model_config: ModelConfig,
    stored: torch.dtype,
    num_ranks: int,
    num_shards: int,
    device_type: str,
) -> tuple[dict[str, Counter[str]], int]:
    """Bytes by part at the moments of a step, and those in the host's memory besides."""
    masters, methods = getattr(torch, config.masters), config.methods
    model = wrapped(build_model(model_config, device="meta"), methods)
    owned = {
        name: shard_rows(len(p), 0, num_shards).stop * p.shape[1:].numel()
        for name, p in model.named_parameters()
    }
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    own = [owned[name] for name in trained]
    held = Counter({MASTERS: masters.itemsize * sum(owned.values())})
    held[STATES] = sum(map(_state_bytes, trained.values(), own, [config.optimizer] * len(own)))
    copy = held[STATES] + masters.itemsize * sum(own)
    others = min(stored.itemsize, masters.itemsize) * sum(own)
    num_tuned = len(config.tuned or [""])
    num_initial = any(m.needs_initial for m in methods)
    keeps_original = any(m.needs_original and m.keeps_original for m in methods)
    held[REFERENCE] = others * (keeps_original + num_initial)
    tuned = masters.itemsize * sum(own) * num_tuned  # a first run writes the masters' dtype
    held[TUNED] = tuned * any(method.keeps_tuned for method in methods)
    for method in methods:
        for part, each in method.keeps.items():
            held[part] += each * sum(own)
    host = 0
    if device_type == "cpu":
        held[CHECKPOINT] = copy
    else:
        aside = held.pop(REFERENCE) + held.pop(TUNED) if config.offload_reference else 0
        host = copy + aside
    work = _work(config, num_ranks, num_shards, device_type)
    update = Counter({GRADIENTS: masters.itemsize * sum(own)})
    if masters == torch.bfloat16:
        chunk = CHUNK_ON_CPU if device_type == "cpu" else CHUNK_ON_DEVICE
        update[UPDATE] = rehearse_rounding(min(max(own), chunk))
    if any(method.filters for method in methods):
        update[COPY] = UPDATE_BYTES * max(own)
    if any(method.needs_teacher for method in methods):
        held[TEACHER] = _teacher_bytes(model_config, stored, work)
    rehearsed = rehearse(model_config, work, partial(wrapped, methods=methods))
    moments = {
        f"forward and backward of {work.num_tokens:,} tokens": held + rehearsed,
        "the optimizer step": held + update,
    }
    if any(method.needs_tuned and not method.merges for method in methods):
        is_aside = device_type != "cpu" and config.offload_reference
        at_first = {REFERENCE: others * (1 + num_initial), TUNED: tuned}
        beginning = held | ({} if is_aside else at_first)
        moments["comparing theta* with the tuned model"] = Counter(beginning)
    return moments, host


def merging_bytes(model_config: ModelConfig, stored: torch.dtype, num_models: int) -> int:
    """What `merge_checkpoints` holds: the largest parameter of each model and of the result in
    float32, and as it is read and written."""
    largest = max(p.numel() for p in build_model(model_config, device="meta").parameters())
    return largest * (torch.float32.itemsize * (num_models + 1) + stored.itemsize)


def _teacher_bytes(model_config: ModelConfig, stored: torch.dtype, work: Work) -> int:
    """theta*'s shards, what FSDP gathers of it, and the hidden states and head that are kept."""
    parameters = list(build_model(model_config, device="meta").named_parameters())
    n = work.num_shards
    held = sum(shard_rows(len(p), 0, n).stop * p.shape[1:].numel() for _, p in parameters)
    hidden = work.num_tokens * model_config.hidden_size * work.compute.itemsize
    head = model_config.vocab_size * model_config.hidden_size
    is_sharded = work.num_ranks > 1 or work.compute != stored
    kept = stored.itemsize * held + hidden
    return kept + (2 * head * work.compute.itemsize if is_sharded else 0)


def _work(config: TrainConfig, num_ranks: int, num_shards: int, device_type: str) -> Work:
    """The most that packing can give a rank: every example as long as may be."""
    most = config.max_length * math.ceil(config.batch_size / num_ranks)
    num_tokens = max(config.max_length, min(config.micro_batch_tokens, most))
    return Work(
        num_tokens,
        document_tokens=config.max_length,
        accumulates=most > num_tokens,
        compute=getattr(torch, config.dtype),
        masters=getattr(torch, config.masters),
        num_ranks=num_ranks,
        num_shards=num_shards,
        device_type=device_type,
        checkpointing=config.activation_checkpointing,
    )


def _state_bytes(shape: torch.Size, num_own: int, optimizer: str) -> int:
    """Both moments of this rank's elements of one parameter: float32, or codes and scales."""
    if optimizer == "adamw" or shape.numel() < MIN_8BIT_ELEMENTS:
        return 2 * torch.float32.itemsize * num_own
    return 2 * (num_own + torch.float32.itemsize * math.ceil(num_own / BLOCK))
