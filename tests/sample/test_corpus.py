"""A corpus is whole or not there, and the same however it was drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import load_model
from cfs.sample import corpus as corpus_module
from cfs.sample.context_free import draw_corpus
from cfs.sample.corpus import Corpus, CorpusSettings, model_fingerprint, read_corpus
from cfs.sample.sampler import SamplingSettings
from tests.conftest import ALONE, REPOSITORY, run_python


def settings_for(directory: Path, **sampling: float) -> CorpusSettings:
    tokenizer = Tokenizer(directory)
    options = {"max_tokens": 30, "seed": 3} | sampling
    return CorpusSettings(
        model=model_fingerprint(directory),
        tokenizer=tokenizer.fingerprint(),
        num_samples=70,
        prompt_ids=[tokenizer.seed_id],
        sampling=SamplingSettings(**options),  # type: ignore[arg-type]
        dtype="float32",
    )


def draw(directory: Path, out: Path, num_slots: int = 16, **sampling: float) -> Corpus:
    model, tokenizer = load_model(directory), Tokenizer(directory)
    return draw_corpus(out, model, tokenizer, settings_for(directory, **sampling), num_slots, ALONE)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SAMPLES_PER_PART", 20)


def test_columns_are_what_they_say(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a column that other readers of the parquet files would misread."""
    draw(tinyworld, tmp_path / "c")
    tokenizer = Tokenizer(tinyworld)
    files = sorted((tmp_path / "c").glob("part-*.parquet"))
    assert [f.name for f in files] == [f"part-{i:05d}.parquet" for i in range(4)]
    rows = [row for f in files for row in pq.read_table(f).to_pylist()]
    assert [r["index"] for r in rows] == list(range(70))
    for row in rows:
        generated = row["input_ids"][row["num_prompt_tokens"] :]
        assert row["num_prompt_tokens"] == 1
        assert row["input_ids"][0] == tokenizer.seed_id
        assert len(generated) == len(row["logprob_model"]) == len(row["logprob_sampler"])
        assert row["text"] == tokenizer.decode(generated)
        assert row["finish_reason"] == ("stop" if generated[-1] == tokenizer.eos_id else "length")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["num_samples"] == 70
    assert sum(p["samples"] for p in manifest["parts"]) == 70


def test_reading_back_gives_what_was_drawn(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a corpus that depends on the slots, or comes back altered."""
    one, other = draw(tinyworld, tmp_path / "a", 7), draw(tinyworld, tmp_path / "b", 64)
    again = read_corpus(tmp_path / "a")
    for x, y, z in zip(one.samples, other.samples, again.samples, strict=True):
        assert x.input_ids.tolist() == y.input_ids.tolist() == z.input_ids.tolist()
        np.testing.assert_allclose(x.logprob_model, y.logprob_model, atol=1e-4)
        assert np.array_equal(x.logprob_model, z.logprob_model)


def test_an_interrupted_corpus_goes_on(tinyworld: Path, tmp_path: Path) -> None:
    """Catches samples lost or doubled by a resume, and parts drawn again for nothing."""
    whole = draw(tinyworld, tmp_path / "whole")
    draw(tinyworld, tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    (tmp_path / "cut" / "part-00001.parquet").unlink()
    untouched = (tmp_path / "cut" / "part-00002.parquet").stat().st_mtime_ns
    resumed = draw(tinyworld, tmp_path / "cut")
    assert [s.input_ids.tolist() for s in resumed.samples] == [
        s.input_ids.tolist() for s in whole.samples
    ]
    assert (tmp_path / "cut" / "part-00002.parquet").stat().st_mtime_ns == untouched


def test_a_finished_corpus_is_reused(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the cache that is never hit."""
    draw(tinyworld, tmp_path / "c")
    monkeypatch.setattr("cfs.sample.context_free.write_corpus", None)  # drawing would fail
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70


def test_other_settings_are_refused_by_name(tinyworld: Path, tmp_path: Path) -> None:
    """Catches two laws mixed in one corpus."""
    draw(tinyworld, tmp_path / "c")
    with pytest.raises(UserError, match=r"temperature=1.0, not 0.5"):
        draw(tinyworld, tmp_path / "c", temperature=0.5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a corpus"):
        draw(tinyworld, tmp_path / "other")


def test_what_a_killed_start_leaves_is_no_obstacle(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a cache that is refused for good because of a temporary file."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".settings.json.tmp-123").write_text("{")
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_corpus(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw(tinyworld, tmp_path / "file")


def test_two_runs_that_draw_one_corpus_take_turns(tinyworld: Path, tmp_path: Path) -> None:
    """Catches one run replacing a part that another has already counted."""
    out = str(tmp_path / "c")
    command = [sys.executable, "generate.py", "--out", out, "--num-samples", "300"]
    runs = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in runs:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert len(read_corpus(out).samples) == 300


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_part_is_named(tinyworld: Path, tmp_path: Path, damage: str) -> None:
    """Catches training on a corpus that is no longer what was drawn."""
    draw(tinyworld, tmp_path / "c")
    file = tmp_path / "c" / "part-00001.parquet"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    else:
        file.unlink()
    with pytest.raises(UserError, match="part-00001"):
        read_corpus(tmp_path / "c")


def test_fingerprint_covers_every_setting(tinyworld: Path) -> None:
    """Catches a cache that returns the samples of another model, seed or temperature."""
    base = settings_for(tinyworld)
    others = [
        replace(base, model="x"),
        replace(base, num_samples=71),
        replace(base, prompt_ids=[1]),
        replace(base, dtype="bfloat16"),
        *(
            replace(base, sampling=replace(base.sampling, **change))
            for change in ({"seed": 4}, {"top_p": 1.0}, {"temperature": 0.9}, {"max_tokens": 31})
        ),
    ]
    assert len({s.fingerprint() for s in [base, *others]}) == 1 + len(others)


def test_two_ranks_draw_the_same_corpus(tmp_path: Path) -> None:
    """Catches a share that depends on the rank, on the real command line."""
    flags = ["--num-samples", "600", "--max-tokens", "20", "--device", "cpu"]
    for ranks in (1, 2):
        out = str(tmp_path / str(ranks))
        done = run_python("generate.py", "--out", out, *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (read_corpus(tmp_path / str(r)).samples for r in (1, 2))
    assert len(one) == 600
    assert [s.input_ids.tolist() for s in one] == [s.input_ids.tolist() for s in two]
