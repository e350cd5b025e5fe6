"""A fixed number of slots over one KV cache; a slot that finishes is refilled in place.

A context-free prompt is one token, so it needs no prefill and every step is the same full-width
step. A longer prompt is written into its slot's rows of the cache, all but its last token, which
the next step feeds like any other.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from cfs.errors import UserError
from cfs.model import Decoder
from cfs.model.attention import AskedRoute
from cfs.model.packed import packed_for_decoding
from cfs.sample.sample import Request, Sample, SamplingSettings
from cfs.sample.slots import Slots

LOOKAHEAD = 512
"""Requests taken at a time and sorted, so that prompts of like length are prefilled together."""
PREFILL_SHARE = 32
"""Slots over this many may wait for a prompt at a time, since prefilling a few together is
cheaper; a context-free slot never waits."""
MOST_SLOTS = {"cpu": 256, "cuda": 2048}
CPU_LOGITS = 2**23
"""Logits of a step (32 MiB in float32) beyond which more slots bring a CPU nothing."""
CPU_SHARE, CUDA_SHARE = 0.5, 0.85
"""Of the free memory, what the slots may take."""
CGROUP = Path("/sys/fs/cgroup")
DRAW_BYTES = 64
"""On CUDA, temporary memory of a draw per logit."""


def choose_num_slots(
    model: Decoder, num_positions: int, num_samples: int, store_topk: int = 0
) -> int:
    """Texts in progress that fit the free memory of this rank's device, and are worth having.

    num_positions  longest prompt and most new tokens together
    num_samples    of this rank; more slots than that stay empty
    """
    config, weight = model.config, model.embed_tokens.weight
    per_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = num_positions * (per_position * weight.element_size() + 8 * store_topk + 24)
    if weight.device.type == "cpu":
        free = _free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        packed = sum(p.numel() * p.element_size() for p in model.parameters())
        budget = CPU_SHARE * max(0, free - packed)
        per_slot = cache + 8 * config.vocab_size
        most = min(MOST_SLOTS["cpu"], CPU_LOGITS // config.vocab_size)
    else:
        gc.collect()
        torch.cuda.empty_cache()
        budget = CUDA_SHARE * torch.cuda.mem_get_info(weight.device)[0]
        per_slot = cache + DRAW_BYTES * config.vocab_size
        most = MOST_SLOTS["cuda"]
    fitting = max(1, min(most, int(budget / per_slot)))
    return min(num_samples, 2 ** int(math.log2(fitting)))


def _free_host_memory() -> int:
    """Bytes that the host, or the container's limit, can still give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError, ValueError):  # no limit reads as "max"
        limit, used = (int((CGROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        free = min(free, max(0, limit - used))
    return free


@dataclass
class Usage:
    """What a generation cost, counted while it runs."""

    slot_steps: int = 0
    """Slots times steps, empty slots included."""
    tokens: int = 0
    """Tokens that became part of a sample."""


@torch.inference_mode()
def generate(
    model: Decoder,
    requests: Iterable[Request],
    settings: SamplingSettings,
    eos_id: int,
    num_tokens: int,
    num_slots: int,
    max_prompt_tokens: int = 1,
    store_topk: int = 0,
    attention: AskedRoute = "auto",
    usage: Usage | None = None,
) -> Iterator[Sample]:
    """Draw every request, in the order in which they finish.

    requests           taken a few hundred at a time
    eos_id             stops a sample when drawn; as a prompt token it stops nothing
    num_tokens         vocabulary that may be drawn; the rest is padding
    num_slots          texts in progress at a time; changes no sample but through rounding
    max_prompt_tokens  longest prompt among the requests
    store_topk         K of `Sample.topk`, at most the vocabulary; 0 leaves it out
    attention          kernel of the decode step

    A sample depends on (settings, index, prompt, model) alone. Raises `UserError` where prompt
    and `max_tokens` exceed the model's context, where the slots do not fit the memory, where the
    kernel is not available, and where logits are not finite.
    """
    context = model.config.max_position_embeddings
    if max_prompt_tokens + settings.max_tokens > context:
        raise UserError(
            f"--max-tokens {settings.max_tokens}: with a prompt of {max_prompt_tokens} it exceeds "
            f"the model's context of {context}"
        )
    queue = _sorted_by_length(requests)
    first = list(islice(queue, num_slots))
    if not first:
        return
    usage = usage or Usage()
    num_positions = max_prompt_tokens + settings.max_tokens
    try:
        slots = Slots(
            packed_for_decoding(model, len(first)),
            settings,
            eos_id,
            num_tokens,
            len(first),
            num_positions,
            store_topk,
            attention,
        )
    except RuntimeError as error:  # torch's allocators raise no other
        if "memory" not in str(error):
            raise
        raise UserError(
            f"--batch-size {num_slots}: a cache of so many texts of {num_positions} tokens does "
            "not fit the memory; take fewer, or leave the flag out"
        ) from error
    slots.fill(list(range(len(first))), first)
    patience = 1 if max_prompt_tokens == 1 else max(1, len(first) // PREFILL_SHARE)
    while slots.num_active:
        usage.slot_steps += len(slots.requests)
        for row in slots.step():
            sample = slots.take(row)
            usage.tokens += len(sample.logprob_model)
            yield sample
        idle = slots.idle_rows()
        if len(idle) >= patience or not slots.num_active:
            waiting = list(islice(queue, len(idle)))
            rows = slots.youngest(idle)
            slots.fill(rows[: len(waiting)], waiting)
            if len(waiting) < len(rows):  # the queue is dry: go on with fewer slots
                slots.drop(rows[len(waiting) :])


def _sorted_by_length(requests: Iterable[Request]) -> Iterator[Request]:
    """The requests, each few hundred of them in order of their prompts' lengths."""
    source = iter(requests)
    while taken := list(islice(source, LOOKAHEAD)):
        yield from sorted(taken, key=lambda request: len(request.prompt_ids))
