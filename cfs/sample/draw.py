"""A corpus drawn by all ranks, or gone on with, or found complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cfs.model import Decoder
from cfs.model.attention import AskedRoute
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.sample.corpus import (
    finish_corpus,
    joined_corpus,
    opened_corpus,
    part_number,
    part_range,
)
from cfs.sample.parts import part_file, write_part
from cfs.sample.prompts import Prompts
from cfs.sample.sample import Request, Sample
from cfs.sample.sampler import generate
from cfs.sample.settings import CorpusSettings


class Vocabulary(Protocol):
    """What sampling needs of a tokenizer."""

    seed_id: int
    eos_id: int
    num_tokens: int

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Drawing:
    """What draws the samples that some `CorpusSettings` describe."""

    model: Decoder
    vocabulary: Vocabulary
    prompts: Prompts
    num_slots: int
    """Texts in progress on each rank; changes no sample but through rounding."""
    attention: AskedRoute = "auto"
    """Kernel of the decode step, likewise."""


@dataclass(frozen=True)
class Drawn:
    """What one run added to a corpus, all ranks together."""

    num_samples: int
    num_tokens: int
    seconds: float
    repaired: list[str]
    """Names of damaged parts among those drawn."""


def draw_corpus(
    directory: str | Path,
    settings: CorpusSettings,
    prepare: Callable[[], Drawing],
    ranks: Ranks,
    repair: bool = False,
) -> Drawn:
    """Make sure that the corpus of `settings` is at `directory`, drawing what it lacks.

    prepare  called once, and only if something is to be drawn
    repair   check every part of a finished corpus, and draw the damaged ones again

    Collective; raises `UserError`.
    """
    with ExitStack() as stack:
        opened = ranks.on_main(
            lambda: stack.enter_context(opened_corpus(directory, settings, repair))
        )
        if opened.is_complete:
            return Drawn(0, 0, 0.0, [])
        stack.enter_context(joined_corpus(directory))
        drawing = prepare() if opened.missing else None
        started = time.monotonic()
        own = opened.missing[ranks.rank :: ranks.world_size]
        counts = (0, 0)
        if drawing is not None:
            counts = _draw_parts(Path(directory), settings, drawing, own, ranks)
        samples, tokens = map(sum, zip(*ranks.gather(counts), strict=True))
        ranks.on_main(lambda: finish_corpus(directory, settings))
        return Drawn(samples, tokens, time.monotonic() - started, opened.damaged)


def _draw_parts(
    directory: Path, settings: CorpusSettings, drawing: Drawing, numbers: list[int], ranks: Ranks
) -> tuple[int, int]:
    """Draw this rank's parts, each written once its last sample ends; samples and tokens drawn."""
    parts = [part_range(number, settings.num_samples) for number in numbers]
    total, num_tokens = sum(map(len, parts)), 0
    started = time.monotonic()
    waiting: dict[int, list[Sample]] = {}
    where = f" (rank 0 of {ranks.world_size})" if ranks.world_size > 1 else ""
    with Bar(f"sample{where}", total, enabled=ranks.is_main) as bar:
        for sample in _samples(settings, drawing, parts):
            num_tokens += len(sample.logprob_model)
            bar.advance(1, f"{num_tokens / (time.monotonic() - started):,.0f} tokens/s")
            number = part_number(sample.index)
            rows = waiting.setdefault(number, [])
            rows.append(sample)
            if len(rows) == len(part_range(number, settings.num_samples)):
                rows = sorted(waiting.pop(number), key=lambda s: s.index)
                write_part(part_file(directory, number), rows, drawing.vocabulary.decode)
    assert not waiting, f"parts {sorted(waiting)} were not completed"
    return total, num_tokens


def _samples(settings: CorpusSettings, drawing: Drawing, parts: list[range]) -> Iterator[Sample]:
    prompts, vocabulary = drawing.prompts, drawing.vocabulary
    requests = (Request(i, prompts.of_sample(i)) for part in parts for i in part)
    return generate(
        drawing.model,
        requests,
        settings.sampling,
        vocabulary.eos_id,
        vocabulary.num_tokens,
        drawing.num_slots,
        max_prompt_tokens=int(prompts.lengths.max()),
        store_topk=settings.store_topk,
        attention=drawing.attention,
    )
