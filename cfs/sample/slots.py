"""The texts in progress: one decode step for all of them, and their coming and going.

Everything a step needs lies on the device; the host reads one line of flags a step. On CUDA the
step is a captured graph.

Shapes: B slots, S positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cfs.errors import UserError
from cfs.model import Decoder
from cfs.model.attention import AskedRoute, DecodeStep, Prefill, Route, Span, choose_route
from cfs.model.kv_cache import KVCache
from cfs.sample.graphs import GraphedStep
from cfs.sample.sample import Request, Sample, SamplingSettings, TopK
from cfs.sample.sampling import draw, top_logprobs, uniforms

PREFILL_TOKENS = 8192
"""Prompt positions, padding included, that one forward pass may hold."""
GROUP = 32
"""Slots on a CPU whose filled cache is read to one length."""


class Slots:
    """Slots of unequal progress. On a CPU they stand in groups, the oldest texts first, so that
    attention reads little beyond what each text has filled."""

    def __init__(
        self,
        model: Decoder,
        settings: SamplingSettings,
        eos_id: int,
        num_tokens: int,
        num_slots: int,
        num_positions: int,
        store_topk: int,
        attention: AskedRoute,
    ) -> None:
        """Arguments as in `sampler.generate`; num_positions holds a prompt and its text."""
        self.model, self.settings, self.eos_id = model, settings, eos_id
        self.num_tokens, self.store_topk = num_tokens, store_topk
        weight = model.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        self.route: Route = choose_route(attention, device, dtype)
        self.cache = KVCache(
            model.config, num_slots, num_positions, dtype, device, self.route != "sdpa"
        )
        self.requests: list[Request | None] = [None] * num_slots
        shape = (num_slots, num_positions)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprob_model = torch.zeros(shape, device=device)
        self.logprob_sampler = torch.zeros(shape, device=device)
        self.topk_ids = torch.zeros(*shape, store_topk, dtype=torch.int32, device=device)
        self.topk_logprobs = torch.zeros(*shape, store_topk, device=device)
        self.rest_mass = torch.zeros(shape if store_topk else (num_slots, 0), device=device)
        self.uniforms = torch.zeros(
            num_slots, settings.max_tokens, dtype=torch.float64, device=device
        )
        self.positions = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """Of the token that each slot feeds next."""
        self.num_generated = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.advances = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """1 for a slot at work, 0 for an idle one."""
        self.host_positions = np.zeros(num_slots, dtype=np.int64)
        """`positions` again, so that how far the cache is filled is known without asking."""
        self.busy = np.zeros(num_slots, dtype=bool)
        self.graphs = GraphedStep() if device.type == "cuda" else None

    @property
    def num_active(self) -> int:
        return int(self.busy.sum())

    def idle_rows(self) -> list[int]:
        """Slots without a text, in rising order."""
        return np.flatnonzero(~self.busy).tolist()

    # ------------------------------------------------------------------------------- a step

    def step(self) -> list[int]:
        """Draw one token in every slot; the rows that finished by it, in rising order."""
        spans = self.spans()
        flags = self.graphs(self, spans) if self.graphs else self.device_step(spans)
        done, finite = flags.cpu().numpy()
        self.host_positions += self.busy
        broken = self.busy & ~finite
        if broken.any():
            self._refuse_not_finite(int(broken.argmax()))
        return np.flatnonzero(self.busy & done).tolist()

    def device_step(self, spans: list[Span]) -> Tensor:
        """(2, B) bool: who is done, and whose logits are finite. Asks the host nothing."""
        token_ids = self.ids.gather(1, self.positions[:, None])
        context = DecodeStep(self.cache, self.positions, spans, self.route)
        logits = self.model(token_ids, context=context)[:, 0]
        finite = logits.amin(-1).isfinite()
        at = self.positions[:, None] + 1
        if self.store_topk:  # before the draw, which may overwrite the logits
            ids, logprobs, rest = top_logprobs(logits, self.store_topk)
            there = at[..., None].expand(-1, -1, self.store_topk)
            self.topk_ids.scatter_(1, there, ids[:, None])
            self.topk_logprobs.scatter_(1, there, logprobs[:, None])
            self.rest_mass.scatter_(1, at, rest[:, None])
        u = self.uniforms.gather(1, self.num_generated[:, None]).squeeze(1)
        token, logprob_model, logprob_sampler = draw(
            logits, u, self.settings.temperature, self.settings.top_p, self.num_tokens
        )
        self.ids.scatter_(1, at, token[:, None])
        self.logprob_model.scatter_(1, at, logprob_model[:, None])
        self.logprob_sampler.scatter_(1, at, logprob_sampler[:, None])
        self.positions += self.advances
        self.num_generated += self.advances
        done = (token == self.eos_id) | (self.num_generated == self.settings.max_tokens)
        finite &= logprob_model.isfinite() & logprob_sampler.isfinite()
        return torch.stack((done, finite))

    def spans(self) -> list[Span]:
        """Groups of slots, and how far the fullest of each group is filled after this step."""
        size = len(self.requests)
        group = GROUP if self.ids.device.type == "cpu" else size
        return [
            Span(
                slice(start, start + group),
                int(self.host_positions[start : start + group].max()) + 1,
            )
            for start in range(0, size, group)
        ]

    def _refuse_not_finite(self, row: int) -> None:
        request = self.requests[row]
        assert request is not None, "only slots at work are looked at"
        raise UserError(
            f"sample {request.index}, position {self.host_positions[row]}: the model's logits are "
            "not finite; check the checkpoint, or use --dtype float32"
        )

    # ------------------------------------------------------------------------ coming, going

    def fill(self, rows: list[int], requests: list[Request]) -> None:
        """Start `requests` in idle `rows`. Prompts of several tokens are prefilled, padded on the
        right to the longest among neighbours; in order of length there is little padding."""
        if not rows:
            return
        longest = max(len(r.prompt_ids) for r in requests)
        prompts = np.zeros((len(rows), longest), dtype=np.int64)
        for prompt, request in zip(prompts, requests, strict=True):
            prompt[: len(request.prompt_ids)] = request.prompt_ids
        numbers = np.stack(
            [uniforms(self.settings.seed, r.index, self.settings.max_tokens) for r in requests]
        )
        device = self.ids.device
        at = torch.tensor(rows, device=device)
        self.ids[at, :longest] = torch.from_numpy(prompts).to(device)
        self.uniforms[at] = torch.from_numpy(numbers).to(device)
        self.host_positions[rows] = [len(r.prompt_ids) - 1 for r in requests]
        self.positions[at] = torch.from_numpy(self.host_positions[rows]).to(device)
        self.num_generated[at] = 0
        self.advances[at] = 1
        self.busy[rows] = True
        for row, request in zip(rows, requests, strict=True):
            self.requests[row] = request
        for some in _prefills([len(r.prompt_ids) - 1 for r in requests]):
            length = max(len(r.prompt_ids) for r in requests[some]) - 1
            context = Prefill(self.cache, at[some], length)
            self.model.hidden_states(self.ids[at[some], :length], context)

    def take(self, row: int) -> Sample:
        """The finished text of `row`, which is idle from now on."""
        request = self.requests[row]
        assert request is not None, "a slot without a request cannot finish"
        num_prompt = len(request.prompt_ids)
        stop = int(self.host_positions[row]) + 1
        generated = slice(num_prompt, stop)

        def on_host(x: Tensor) -> np.ndarray:
            return x[row, generated].cpu().numpy().copy()

        ids = self.ids[row, :stop].cpu().numpy().astype(np.int32)
        topk = None
        if self.store_topk:
            topk = TopK(*map(on_host, (self.topk_ids, self.topk_logprobs, self.rest_mass)))
        sample = Sample(
            index=request.index,
            input_ids=ids,
            num_prompt_tokens=num_prompt,
            logprob_model=on_host(self.logprob_model),
            logprob_sampler=on_host(self.logprob_sampler),
            finish_reason="stop" if ids[-1] == self.eos_id else "length",
            topk=topk,
        )
        self._rest(row)
        return sample

    def youngest(self, idle: list[int]) -> list[int]:
        """As many idle rows as `idle`, in the groups of the shortest texts.

        A gap is closed by the longest text of the next group, whose place by that of the one
        after, and so on: a move costs its text's cache once, and groups stay sorted by length.
        """
        spans = self.spans()
        if len(spans) == 1:
            return idle
        for gap in idle:
            for span in spans[gap // GROUP + 1 :]:
                ages = self.host_positions[span.rows]
                oldest = span.rows.start + int(ages.argmax())
                if self.busy[oldest]:
                    self._move(oldest, gap)
                    gap = oldest
        return self.idle_rows()

    def drop(self, rows: list[int]) -> None:
        """Remove idle slots that stay so, so that the last texts pay for themselves alone.

        On CUDA they stay until half of all are idle, as another number of slots is another graph.
        """
        if self.ids.device.type == "cuda" and 2 * self.num_active > len(self.requests):
            return
        for row in sorted(rows, reverse=True):
            last = len(self.requests) - 1
            if row != last:
                self._move(last, row)
            self.requests.pop()
        count = len(self.requests)
        for name in self._STATE:
            setattr(self, name, getattr(self, name)[:count])
        self.cache.keep_first(count)

    _STATE = (
        *("ids", "logprob_model", "logprob_sampler", "topk_ids", "topk_logprobs", "rest_mass"),
        *("uniforms", "positions", "num_generated", "advances", "host_positions", "busy"),
    )

    def _move(self, source: int, target: int) -> None:
        """Let idle row `target` go on with the text of `source`, which is idle then."""
        self.cache.copy_row(source, target, int(self.host_positions[source]) + 1)
        for name in self._STATE:
            state = getattr(self, name)
            state[target] = state[source]
        self.requests[target] = self.requests[source]
        self._rest(source)

    def _rest(self, row: int) -> None:
        """Leave `row` idle: it goes on stepping at position 0, where it reads and harms nothing."""
        self.requests[row] = None
        for state in (
            self.positions,
            self.num_generated,
            self.advances,
            self.host_positions,
            self.busy,
        ):
            state[row] = 0


def _prefills(lengths: list[int]) -> list[slice]:
    """Neighbours whose padded prompts together hold at most PREFILL_TOKENS; none for no prompt."""
    slices, start = [], 0
    while start < len(lengths):
        stop, longest = start, 0
        while stop < len(lengths):
            longest = max(longest, lengths[stop])
            if stop > start and longest * (stop + 1 - start) > PREFILL_TOKENS:
                break
            stop += 1
        if max(lengths[start:stop]) > 0:
            slices.append(slice(start, stop))
        start = stop
    return slices
