"""What is said of a corpus, held against counting by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from cfs.sample import statistics as statistics_module
from cfs.sample.draw import Drawn
from cfs.sample.sample import Sample
from cfs.sample.statistics import measure, print_statistics


def sample(index: int, ids: list[int], num_prompt: int = 1, reason: str = "stop") -> Sample:
    logprobs = np.linspace(-1, -2, len(ids) - num_prompt, dtype=np.float32)
    return Sample(index, np.array(ids, dtype=np.int32), num_prompt, logprobs, logprobs / 2, reason)


SAMPLES = [
    sample(0, [9, 1, 2, 1, 2, 0]),
    sample(1, [9, 1, 2], reason="length"),
    sample(2, [9, 1, 2, 1, 2, 0]),
    sample(3, [9, 1, 2, 1, 2, 0], num_prompt=3),
    sample(4, [9, 4, 70000, 2**20]),
]


def distinct_by_hand(n: int) -> float:
    generated = [s.input_ids[s.num_prompt_tokens :].tolist() for s in SAMPLES]
    ngrams = [tuple(ids[i : i + n]) for ids in generated for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams)


def test_numbers_are_those_of_counting() -> None:
    """Catches prompts counted as text, n-grams across two samples, averages of averages."""
    found = measure(iter(SAMPLES), len(SAMPLES))
    lengths = [len(s.logprob_model) for s in SAMPLES]
    assert found.num_tokens == sum(lengths) == 18
    assert found.num_stopped == 4
    assert found.distinct == pytest.approx([distinct_by_hand(n) for n in (1, 2, 3)])
    assert found.num_distinct == 5
    assert found.duplicates == pytest.approx(2 / 5), "two repeat the ids of sample 0"
    nll = -sum(float(s.logprob_model.sum()) for s in SAMPLES) / sum(lengths)
    assert found.cross_entropy_nats == pytest.approx(nll)
    assert found.entropy_nats == pytest.approx(nll / 2)


def test_distinct_looks_at_the_first_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the corpus, and a bound that is not told."""
    monkeypatch.setattr(statistics_module, "DISTINCT_SAMPLES", 2)
    found = measure(iter(SAMPLES), len(SAMPLES))
    assert found.num_distinct == 2
    assert found.distinct[0] == pytest.approx(3 / 7)
    monkeypatch.setattr(statistics_module, "DISTINCT_TOKENS", 1)
    assert measure(iter(SAMPLES), len(SAMPLES)).num_distinct == 1, "one at least"


def test_texts_too_short_for_an_ngram(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a division by zero where every text is one token long."""
    found = measure(iter([sample(0, [9, 0])]), 1)
    assert found.distinct[0] == 1
    assert np.isnan(found.distinct[1])
    print_statistics(found, Drawn(0, 0, 0.0, []), "c")
    assert "nan" in capsys.readouterr().out


def test_the_table_says_what_was_measured() -> None:
    """Catches a title that is obeyed as markup, and a speed where nothing was drawn."""
    out = io.StringIO()
    found = measure(iter(SAMPLES), len(SAMPLES))
    console = Console(file=out, width=100)
    print_statistics(found, Drawn(5, 18, 2.0, []), "runs/[bold]x", console)
    text = out.getvalue()
    for said in ("runs/[bold]x", "first 5 samples", "mean of -log q", "40.00%", "9 tokens/s"):
        assert said in text
    out.truncate(0)
    print_statistics(found, Drawn(0, 0, 0.0, []), "x", console)
    assert "this run" not in out.getvalue()
