"""A fixed number of slots over one KV cache; a slot that finishes is refilled in place.

A context-free prompt is one token, so it needs no prefill and every step is the same full-width
step. A longer prompt is written into its slot's rows of the cache, all but its last token, which
the next step feeds like any other.

Shapes: B slots, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from cfs.errors import UserError
from cfs.model import Decoder
from cfs.model.attention import DecodeStep, Prefill
from cfs.model.kv_cache import KVCache
from cfs.sample.sampling import draw, uniforms


@dataclass(frozen=True)
class SamplingSettings:
    """What decides a sample, beside the model and its index."""

    max_tokens: int
    """Most tokens after the prompt, end-of-text included."""
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: expected at least 1")
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: expected in (0, 1]")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed}: expected in [0, 2^64)")


@dataclass(frozen=True)
class Request:
    """Sample number `index`, to continue `prompt_ids` (seed token included)."""

    index: int
    prompt_ids: list[int]


@dataclass(frozen=True)
class TopK:
    """The head of p_theta* (temperature 1, untruncated) at each generated position, n of them.

    ids        (n, K) int32, most probable first
    logprobs   (n, K) float32, nats
    rest_mass  (n,) float32, the probability of all other tokens together
    """

    ids: np.ndarray
    logprobs: np.ndarray
    rest_mass: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A finished text; log-probabilities are in nats, one per generated token.

    input_ids        (num_prompt_tokens + num_generated,) int32, the stop token included
    logprob_model    (num_generated,) float32, log p_theta* at temperature 1, untruncated
    logprob_sampler  (num_generated,) float32, log q, the law the token was drawn from
    finish_reason    "stop" at end-of-text, "length" at the limit
    """

    index: int
    input_ids: np.ndarray
    num_prompt_tokens: int
    logprob_model: np.ndarray
    logprob_sampler: np.ndarray
    finish_reason: str
    topk: TopK | None = None


def choose_num_slots(model: Decoder, num_positions: int, num_samples: int) -> int:
    """Texts in progress that fit this device's free memory, at most as many as there are samples.

    num_positions  longest prompt and most new tokens together
    """
    return min(128, num_samples)


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
) -> Iterator[Sample]:
    """Draw every request, in the order in which they finish.

    eos_id             stops a sample when drawn; as a prompt token it stops nothing
    num_tokens         vocabulary that may be drawn; the rest is padding
    num_slots          texts in progress at a time; changes no sample but through rounding
    max_prompt_tokens  longest prompt among the requests
    store_topk         K of `Sample.topk`; 0 leaves it out

    A sample depends on (settings, index, prompt, model) alone. Raises `UserError` where prompt
    and `max_tokens` exceed the model's context, and where logits are not finite.
    """
    context = model.config.max_position_embeddings
    if max_prompt_tokens + settings.max_tokens > context:
        raise UserError(
            f"--max-tokens {settings.max_tokens}: with a prompt of {max_prompt_tokens} it exceeds "
            f"the model's context of {context}"
        )
    queue = iter(requests)
    first = list(islice(queue, num_slots))
    if not first:
        return
    slots = _Slots(model, settings, eos_id, len(first), max_prompt_tokens)
    slots.fill(list(range(len(first))), first)
    while slots.requests:
        finished = slots.step(num_tokens)
        if not finished:
            continue
        yield from (slots.take(row) for row in finished)
        waiting = list(islice(queue, len(finished)))
        slots.fill(finished[: len(waiting)], waiting)
        if len(waiting) < len(finished):  # the queue is dry: go on with fewer rows
            slots.drop(finished[len(waiting) :])


class _Slots:
    """The texts in progress. Host state is what stopping and refilling need, no more."""

    def __init__(
        self,
        model: Decoder,
        settings: SamplingSettings,
        eos_id: int,
        num_slots: int,
        max_prompt_tokens: int,
    ) -> None:
        self.model, self.settings, self.eos_id = model, settings, eos_id
        weight = model.embed_tokens.weight
        device, num_positions = weight.device, max_prompt_tokens + settings.max_tokens
        self.cache = KVCache(model.config, num_slots, num_positions, weight.dtype, device)
        self.requests: list[Request | None] = [None] * num_slots
        self.ids = torch.zeros(num_slots, num_positions, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(num_slots, settings.max_tokens, dtype=torch.float64)
        self.uniforms = self.uniforms.to(device)
        self.logprobs = torch.zeros(2, num_slots, num_positions, device=device)
        self.positions = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.num_generated = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.host_positions = np.zeros(num_slots, dtype=np.int64)
        """`positions` again, so that how far the cache is filled is known without asking."""

    def fill(self, rows: list[int], requests: list[Request]) -> None:
        """Start `requests` in `rows`, prompts of several tokens by one padded prefill."""
        if not rows:
            return
        longest = max(len(r.prompt_ids) for r in requests)
        prompts = np.zeros((len(rows), longest), dtype=np.int64)
        for prompt, request in zip(prompts, requests, strict=True):
            prompt[: len(request.prompt_ids)] = request.prompt_ids
        numbers = [
            uniforms(self.settings.seed, r.index, self.settings.max_tokens) for r in requests
        ]
        device = self.ids.device
        at = torch.tensor(rows, device=device)
        on_device = torch.from_numpy(prompts).to(device)
        if longest > 1:
            without_last = on_device[:, :-1]
            self.model.hidden_states(without_last, Prefill(self.cache, at, longest - 1))
        self.ids[at, :longest] = on_device
        self.uniforms[at] = torch.from_numpy(np.stack(numbers)).to(device)
        self.host_positions[rows] = [len(r.prompt_ids) - 1 for r in requests]
        self.positions[at] = torch.from_numpy(self.host_positions[rows]).to(device)
        self.num_generated[at] = 0
        for row, request in zip(rows, requests, strict=True):
            self.requests[row] = request

    def step(self, num_tokens: int) -> list[int]:
        """Draw one token in every slot; the rows that finished by it, in rising order."""
        token_ids = self.ids.gather(1, self.positions[:, None])
        num_filled = int(self.host_positions.max()) + 1
        context = DecodeStep(self.cache, self.positions, num_filled)
        logits = self.model(token_ids, context=context)[:, 0]
        u = self.uniforms.gather(1, self.num_generated[:, None]).squeeze(1)
        token, logprob_model, logprob_sampler = draw(
            logits, u, self.settings.temperature, self.settings.top_p, num_tokens
        )
        self.positions += 1
        self.host_positions += 1
        self.num_generated += 1
        at = self.positions[:, None]
        self.ids.scatter_(1, at, token[:, None])
        self.logprobs[0].scatter_(1, at, logprob_model[:, None])
        self.logprobs[1].scatter_(1, at, logprob_sampler[:, None])
        # One read by the host a step: stopping, and a look at the logits' health.
        done = (token == self.eos_id) | (self.num_generated == self.settings.max_tokens)
        flags = torch.stack((done, logprob_model.isfinite())).cpu().numpy()
        if not flags[1].all():
            self._refuse_not_finite(int(np.flatnonzero(~flags[1])[0]))
        return np.flatnonzero(flags[0]).tolist()

    def take(self, row: int) -> Sample:
        """The finished text of `row`."""
        request = self.requests[row]
        assert request is not None, "a slot without a request cannot finish"
        self.requests[row] = None
        num_prompt = len(request.prompt_ids)
        stop = int(self.host_positions[row]) + 1
        logprobs = self.logprobs[:, row, num_prompt:stop].cpu().numpy()
        ids = self.ids[row, :stop].cpu().numpy().astype(np.int32)
        return Sample(
            index=request.index,
            input_ids=ids,
            num_prompt_tokens=num_prompt,
            logprob_model=logprobs[0].copy(),
            logprob_sampler=logprobs[1].copy(),
            finish_reason="stop" if ids[-1] == self.eos_id else "length",
        )

    def drop(self, rows: list[int]) -> None:
        """Remove slots that stay empty, so that the last texts pay for themselves alone.

        The last slot moves into the gap: one row is copied, whatever the number of slots.
        """
        state = (self.ids, self.uniforms, self.positions, self.num_generated)
        for row in sorted(rows, reverse=True):
            last = len(self.requests) - 1
            if row != last:
                for tensor in (*state, self.logprobs[0], self.logprobs[1], self.host_positions):
                    tensor[row] = tensor[last]
                self.cache.copy_row(last, row)
                self.requests[row] = self.requests[last]
            self.requests.pop()
        count = len(self.requests)
        self.ids, self.uniforms, self.positions, self.num_generated = (x[:count] for x in state)
        self.logprobs = self.logprobs[:, :count]
        self.host_positions = self.host_positions[:count]
        self.cache.keep_first(count)

    def _refuse_not_finite(self, row: int) -> None:
        request = self.requests[row]
        assert request is not None, "every slot holds a request while stepping"
        raise UserError(
            f"sample {request.index}, position {self.host_positions[row]}: the model's logits are "
            "not finite; check the checkpoint, or use --dtype float32"
        )
