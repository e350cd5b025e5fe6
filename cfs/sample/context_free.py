"""The context-free corpus of a model: drawn once, found again by its fingerprint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from cfs.model import Decoder
from cfs.progress import Bar
from cfs.ranks import Ranks
from cfs.sample.corpus import (
    Corpus,
    CorpusSettings,
    finish_corpus,
    missing_parts,
    opened_corpus,
    read_corpus,
    write_corpus,
)
from cfs.sample.sampler import Sample


class Vocabulary(Protocol):
    """What sampling needs of a tokenizer."""

    seed_id: int
    eos_id: int
    num_tokens: int

    def decode(self, ids: list[int]) -> str: ...


def draw_corpus(
    directory: str | Path,
    model: Decoder,
    vocabulary: Vocabulary,
    settings: CorpusSettings,
    num_slots: int,
    ranks: Ranks,
) -> Corpus:
    """The corpus of `settings` at `directory`: read if it is there, else drawn by all ranks.

    num_slots  texts in progress on each rank. Collective.
    """
    with ExitStack() as stack:
        is_there = ranks.on_main(lambda: stack.enter_context(opened_corpus(directory, settings)))
        if not is_there:
            _draw_missing(directory, model, vocabulary, settings, num_slots, ranks)
            ranks.on_main(lambda: finish_corpus(directory, settings))
    return read_corpus(directory)


def _draw_missing(
    directory: str | Path,
    model: Decoder,
    vocabulary: Vocabulary,
    settings: CorpusSettings,
    num_slots: int,
    ranks: Ranks,
) -> None:
    """Every rank draws its share of the parts that are not there."""
    parts = missing_parts(directory, settings, ranks.rank, ranks.world_size)
    started, num_tokens = time.monotonic(), 0
    with Bar("sample", sum(map(len, parts)), enabled=ranks.is_main) as bar:

        def count(sample: Sample) -> None:
            nonlocal num_tokens
            num_tokens += len(sample.logprob_model)
            bar.advance(1, f"{num_tokens / (time.monotonic() - started):,.0f} tokens/s")

        write_corpus(
            directory,
            model,
            settings,
            vocabulary.eos_id,
            vocabulary.num_tokens,
            num_slots,
            vocabulary.decode,
            parts,
            on_sample=count,
        )
    ranks.wait()
