"""What a corpus is like, in one pass that holds one part of it at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from cfs.sample.draw import Drawn
from cfs.sample.sample import Sample

DISTINCT_SAMPLES = 1024
DISTINCT_TOKENS = 2**20
"""distinct-n looks at the first samples up to these bounds: beyond, it would say more about how
many there are than about how they differ."""
ID_BITS = 21
"""Of a token id in a packed n-gram, so that three fit 64 bits."""


@dataclass(frozen=True)
class CorpusStatistics:
    """Counts are of generated tokens, the prompt left out."""

    num_samples: int
    num_tokens: int
    num_stopped: int
    """Samples that end with end-of-text; the others reached the limit."""
    entropy_nats: float
    """Mean of -log q over all tokens, q the law they were drawn from (temperature and top-p
    applied): estimates the entropy of that law per token."""
    cross_entropy_nats: float
    """Mean of -log p_theta* over the same tokens (temperature 1, untruncated)."""
    distinct: tuple[float, float, float]
    """Share of different 1-, 2- and 3-grams among those of the first `num_distinct` samples."""
    num_distinct: int
    duplicates: float
    """Share of samples equal, prompt included, to one of lower index."""


def measure(samples: Iterable[Sample], num_samples: int) -> CorpusStatistics:
    """Statistics of `num_samples` samples; 8 bytes are kept of each."""
    hashes = np.zeros(num_samples, dtype=np.uint64)
    count = tokens = stopped = looked_at = 0
    nll_sampler = nll_model = 0.0
    ngrams: list[list[np.ndarray]] = [[], [], []]
    for sample in samples:
        digest = hashlib.blake2b(sample.input_ids.tobytes(), digest_size=8).digest()
        hashes[count] = int.from_bytes(digest, "little")
        count += 1
        num_generated = len(sample.logprob_model)
        tokens += num_generated
        stopped += sample.finish_reason == "stop"
        nll_sampler -= float(sample.logprob_sampler.sum(dtype=np.float64))
        nll_model -= float(sample.logprob_model.sum(dtype=np.float64))
        within = count <= DISTINCT_SAMPLES and tokens <= DISTINCT_TOKENS
        if within or count == 1:
            looked_at = count
            for n, found in enumerate(ngrams, start=1):
                found.append(_packed_ngrams(sample.input_ids[sample.num_prompt_tokens :], n))
    assert count == num_samples, f"{count} samples where {num_samples} were announced"
    one, two, three = (_distinct_share(found) for found in ngrams)
    return CorpusStatistics(
        num_samples=count,
        num_tokens=tokens,
        num_stopped=stopped,
        entropy_nats=nll_sampler / tokens,
        cross_entropy_nats=nll_model / tokens,
        distinct=(one, two, three),
        num_distinct=looked_at,
        duplicates=1 - len(np.unique(hashes)) / count,
    )


def print_statistics(
    statistics: CorpusStatistics, drawn: Drawn, title: str, console: Console | None = None
) -> None:
    """A line of `title` and a table: the corpus, and what this run drew of it."""
    s = statistics
    limit = s.num_samples - s.num_stopped
    rows = [
        ("samples", f"{s.num_samples:,}"),
        ("tokens, prompts left out", f"{s.num_tokens:,}"),
        ("mean length", f"{s.num_tokens / s.num_samples:.1f} tokens"),
        ("ended by end-of-text", f"{s.num_stopped:,} ({s.num_stopped / s.num_samples:.1%})"),
        ("ended by --max-tokens", f"{limit:,} ({limit / s.num_samples:.1%})"),
        ("entropy as drawn, mean of -log q", f"{s.entropy_nats:.3f} nats per token"),
        ("under the model, mean of -log p", f"{s.cross_entropy_nats:.3f} nats per token"),
        (
            f"distinct-1/2/3, first {s.num_distinct:,} samples",
            " / ".join(f"{share:.3f}" for share in s.distinct),
        ),
        ("duplicate samples", f"{s.duplicates:.2%}"),
    ]
    if drawn.num_samples:
        speed = drawn.num_tokens / drawn.seconds
        rows += [
            ("drawn by this run", f"{drawn.num_samples:,} samples in {drawn.seconds:.1f} s"),
            ("speed of this run", f"{speed:,.0f} tokens/s"),
        ]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    console = console or Console()
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def _packed_ngrams(ids: np.ndarray, n: int) -> np.ndarray:
    """Each run of n ids as one number."""
    wide = ids.astype(np.uint64)
    packed = np.zeros(max(len(ids) - n + 1, 0), dtype=np.uint64)
    for offset in range(n):
        packed = packed << np.uint64(ID_BITS) | wide[offset : offset + len(packed)]
    return packed


def _distinct_share(ngrams: list[np.ndarray]) -> float:
    found = np.concatenate(ngrams) if ngrams else np.zeros(0)
    return len(np.unique(found)) / len(found) if len(found) else float("nan")
