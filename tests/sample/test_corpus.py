"""A corpus is whole or not there, and the same however it was drawn."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.model import load_model
from cfs.sample import corpus as corpus_module
from cfs.sample import draw as draw_module
from cfs.sample import parts as parts_module
from cfs.sample.corpus import Corpus, read_corpus, stream_corpus
from cfs.sample.draw import Drawing, Drawn, draw_corpus
from cfs.sample.prompts import Prompts
from cfs.sample.sample import Request, Sample, SamplingSettings
from cfs.sample.settings import CorpusSettings, model_fingerprint
from tests.conftest import ALONE, REPOSITORY, run_python

PART = "part-00001.parquet"


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


def draw_with(
    directory: Path,
    out: Path,
    settings: CorpusSettings,
    num_slots: int = 16,
    prompts: Prompts | None = None,
    repair: bool = False,
) -> Drawn:
    def prepare() -> Drawing:
        tokenizer = Tokenizer(directory)
        seed = Prompts([[tokenizer.seed_id]])
        return Drawing(load_model(directory), tokenizer, prompts or seed, num_slots)

    return draw_corpus(out, settings, prepare, ALONE, repair)


def draw(directory: Path, out: Path, num_slots: int = 16, **sampling: float) -> Corpus:
    draw_with(directory, out, settings_for(directory, **sampling), num_slots)
    return read_corpus(out)


def repair(directory: Path, out: Path) -> Drawn:
    return draw_with(directory, out, settings_for(directory), repair=True)


def ids_of(corpus: Corpus) -> list[list[int]]:
    return [s.input_ids.tolist() for s in corpus.samples]


def contents(out: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in out.iterdir()}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def lose_record(file: Path) -> None:
    file.with_name(f".{file.stem}.sha256").unlink()


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let drawing die once `count` samples are finished."""
    real = draw_module.generate

    def dying(*args: object, **kwargs: object) -> Iterator[Sample]:
        yield from islice(real(*args, **kwargs), count)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_module, "generate", dying)


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


def interrupt(directory: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Begin a corpus at `out` and stop after so many samples."""
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(KeyboardInterrupt):
            draw(directory, out)


def test_an_interrupted_corpus_goes_on(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches samples lost or doubled by a resume, and parts drawn again for nothing."""
    whole, out = draw(tinyworld, tmp_path / "whole"), tmp_path / "cut"
    interrupt(tinyworld, out, monkeypatch, 50)
    there = {f.name: f.stat().st_mtime_ns for f in out.glob("part-*")}
    assert 0 < len(there) < 4
    drawn = draw_with(tinyworld, out, settings_for(tinyworld))
    assert drawn.num_samples == 70 - sum(10 if "3" in name else 20 for name in there)
    assert drawn.repaired == []
    assert ids_of(read_corpus(out)) == ids_of(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    names = {f.name for f in out.iterdir() if not f.name.startswith("part-")}
    assert names == {".lock", ".drawing", "settings.json", "manifest.json"}, "nothing else is left"


@pytest.mark.parametrize("damage", [flip, truncate, lose_record])
def test_damage_before_the_manifest_is_found(
    tinyworld: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    """Catches a manifest that vouches for a part damaged between two runs."""
    whole, out = draw(tinyworld, tmp_path / "whole"), tmp_path / "cut"
    interrupt(tinyworld, out, monkeypatch, 60)
    victim = sorted(out.glob("part-*"))[0]
    damage(victim)
    drawn = draw_with(tinyworld, out, settings_for(tinyworld))
    assert drawn.repaired == [victim.name]
    assert ids_of(read_corpus(out)) == ids_of(whole)


def test_a_record_without_its_part_is_no_part(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kill between the two writes of a part that loses its samples."""

    def die(*_args: object) -> None:
        raise KeyboardInterrupt

    real = parts_module.record_sha256
    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "record_sha256", lambda *args: (real(*args), die()))
        with pytest.raises(KeyboardInterrupt):
            draw(tinyworld, tmp_path / "c")
    left = {f.name for f in (tmp_path / "c").iterdir()}
    assert len([name for name in left if name.endswith(".sha256")]) == 1
    assert not any(name.endswith(".parquet") or ".tmp-" in name for name in left)
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70


def test_a_finished_corpus_is_reused(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the cache that is never hit."""
    draw(tinyworld, tmp_path / "c")
    monkeypatch.setattr(draw_module, "generate", None)  # drawing would fail
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70
    drawn = draw_corpus(
        tmp_path / "c", settings_for(tinyworld), lambda: pytest.fail("a load"), ALONE
    )
    assert drawn.num_samples == 0


def test_other_settings_are_refused_by_name(tinyworld: Path, tmp_path: Path) -> None:
    """Catches two laws mixed in one corpus, and a message that does not say which flag."""
    draw(tinyworld, tmp_path / "c")
    with pytest.raises(UserError, match=r"--temperature 1.0, not 0.5"):
        draw(tinyworld, tmp_path / "c", temperature=0.5)
    base = settings_for(tinyworld)
    for other, said in (
        (replace(base, model="0123456789abcdef"), r"another model .* not 0123456789ab;"),
        (replace(base, tokenizer="beef"), "another tokenizer"),
        (replace(base, prompt_ids=[1]), r"prompt ids \[0\], not prompt ids \[1\] \(--seed-text"),
        (replace(base, prompt_ids=None, prompts="x"), "not contextual"),
        (replace(base, store_topk=5), "--store-topk 0, not 5"),
        (replace(base, num_samples=71), "--num-samples 70, not 71"),
        (replace(base, version=3), "in version 2 of the format, not 3"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            draw_with(tinyworld, tmp_path / "c", other)
        assert "\n" not in str(caught.value)


def test_a_directory_of_something_else_is_left_alone(tinyworld: Path, tmp_path: Path) -> None:
    """Catches files put into, or removed from, a directory that was named by mistake."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "other" / ".thesis.txt.tmp-1").write_text("its backup")
    before = contents(tmp_path / "other")
    with pytest.raises(UserError, match="not a corpus"):
        draw(tinyworld, tmp_path / "other")
    with pytest.raises(UserError, match="holds no corpus"):
        repair(tinyworld, tmp_path / "other")
    with pytest.raises(UserError, match="holds no corpus"):
        repair(tinyworld, tmp_path / "nowhere")
    assert contents(tmp_path / "other") == before
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_start_leaves_is_no_obstacle(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a cache that is refused for good because of a temporary file, or keeps it."""
    (tmp_path / "c").mkdir()
    stale = {".settings.json.tmp-123", ".part-00001.parquet.tmp-9", "..part-00001.sha256.tmp-9"}
    for name in [*stale, ".note"]:
        (tmp_path / "c" / name).write_text("{")
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70
    left = {f.name for f in (tmp_path / "c").iterdir()}
    assert not left & stale
    assert ".note" in left, "what is not ours is not touched"
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


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_part_is_named_and_repaired_alone(
    tinyworld: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Catches training on a corpus that is no longer what was drawn, and a repair of too much."""
    out = tmp_path / "c"
    whole = draw(tinyworld, out)
    before = contents(out)
    damage(out / PART)
    with pytest.raises(UserError, match=rf"{PART}: is (damaged|missing).*--repair") as caught:
        read_corpus(out)
    assert "\n" not in str(caught.value)
    drawn = repair(tinyworld, out)
    assert (drawn.repaired, drawn.num_samples) == ([PART], 20)
    repaired = read_corpus(out)
    assert ids_of(repaired) == ids_of(whole)
    for x, y in zip(whole.samples, repaired.samples, strict=True):
        np.testing.assert_allclose(x.logprob_model, y.logprob_model, atol=1e-4)
    after = contents(out)
    assert set(after) == set(before)
    assert {n for n in after if after[n] != before[n]} <= {PART, "manifest.json"}


def test_a_repair_under_the_same_circumstances_gives_the_same_bytes(
    tinyworld: Path, tmp_path: Path
) -> None:
    """Catches a part that depends on more than its rows, as by a time stamp.

    Here all parts are drawn again, so the batches are the same too; where only some are, their
    log-probabilities may differ by rounding.
    """
    draw(tinyworld, tmp_path / "c")
    before = contents(tmp_path / "c")
    for file in (tmp_path / "c").glob("part-*"):
        flip(file)
    assert len(repair(tinyworld, tmp_path / "c").repaired) == 4
    assert contents(tmp_path / "c") == before


def test_a_repair_of_what_is_intact_changes_nothing(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a check that costs the parts it checks."""
    draw(tinyworld, tmp_path / "c")
    before = contents(tmp_path / "c")
    monkeypatch.setattr(draw_module, "generate", None)  # drawing would fail
    assert repair(tinyworld, tmp_path / "c") == Drawn(0, 0, 0.0, [])
    assert contents(tmp_path / "c") == before


def test_an_interrupted_repair_goes_on(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a repair that, killed, costs the parts that were intact."""
    out = tmp_path / "c"
    whole = draw(tinyworld, out)
    intact = (out / "part-00000.parquet").stat().st_mtime_ns
    flip(out / PART)
    (out / "part-00002.parquet").unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            repair(tinyworld, out)
    with pytest.raises(UserError, match="is not finished"):
        read_corpus(out)
    assert ids_of(draw(tinyworld, out)) == ids_of(whole)
    assert (out / "part-00000.parquet").stat().st_mtime_ns == intact


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"parts": [1], "settings": {}}'])
def test_a_damaged_manifest_is_named_and_repaired(
    tinyworld: Path, tmp_path: Path, content: str
) -> None:
    """Catches a traceback, or a corpus that no command brings back."""
    out = tmp_path / "c"
    whole = draw(tinyworld, out)
    (out / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged.*--repair"):
        read_corpus(out)
    assert len(repair(tinyworld, out).repaired) == 4
    assert ids_of(read_corpus(out)) == ids_of(whole)


def test_other_versions_of_the_format(tinyworld: Path, tmp_path: Path) -> None:
    """Catches an older corpus that can no longer be read, and a newer one that is misread."""
    whole = draw(tinyworld, tmp_path / "c")
    file = tmp_path / "c" / "manifest.json"
    manifest = json.loads(file.read_text())
    for key in ("num_prompts", "prompts", "store_topk"):
        del manifest["settings"][key]
    manifest["settings"]["version"] = 1
    file.write_text(json.dumps(manifest))
    assert ids_of(read_corpus(tmp_path / "c")) == ids_of(whole)
    manifest["settings"]["version"] = 3
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="version 3 of the format; this cfs reads 2"):
        read_corpus(tmp_path / "c")


def test_damaged_settings_are_recovered_from_the_manifest(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a whole corpus lost for one small file."""
    draw(tinyworld, tmp_path / "c")
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json: damaged"):
        draw(tinyworld, tmp_path / "c")
    repair(tinyworld, tmp_path / "c")
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_one_line_and_costs_nothing(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Catches a traceback, a half-written part, or a temporary file on a full disk."""
    whole, out = draw(tinyworld, tmp_path / "whole"), tmp_path / "c"
    real, calls = pq.write_table, 0

    def failing(table: pa.Table, where: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            where.write_bytes(b"PAR1 and no more")
            raise OSError(code, "Error writing bytes to file")
        real(table, where)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", failing)
        with pytest.raises(
            UserError, match=r"part-0000\d\.parquet: cannot be written \("
        ) as caught:
            draw(tinyworld, out)
    assert "\n" not in str(caught.value)
    assert "the same command goes on" in str(caught.value)
    left = {f.name for f in out.iterdir()}
    assert not any(".tmp-" in name for name in left)
    assert len([name for name in left if name.endswith(".parquet")]) == 1
    assert ids_of(draw(tinyworld, out)) == ids_of(whole)


def test_a_disk_that_is_full_at_the_manifest(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the last write of all as the one that is not guarded."""
    real = corpus_module.write_atomically

    def failing(path: Path, content: str) -> None:
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "")
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "write_atomically", failing)
        with pytest.raises(UserError, match=r"manifest\.json: cannot be written \(No space"):
            draw(tinyworld, tmp_path / "c")
    monkeypatch.setattr(draw_module, "generate", None)  # every part is there: drawing would fail
    assert len(draw(tinyworld, tmp_path / "c").samples) == 70


def test_reading_holds_one_part_at_a_time(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a reader that loads the whole corpus before it gives the first sample."""
    draw(tinyworld, tmp_path / "c")
    (tmp_path / "c" / "part-00003.parquet").unlink()
    samples = stream_corpus(tmp_path / "c")
    assert [s.index for s in islice(samples, 60)] == list(range(60))
    with pytest.raises(UserError, match="part-00003"):
        next(samples)


READ_AND_COUNT_THREADS = """
import os, sys
from pathlib import Path
from cfs.files import sha256
from cfs.sample.parts import read_part
file = Path(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
assert len(list(read_part(file, sha256(file)))) == 20
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_reading_leaves_no_thread_behind(tinyworld: Path, tmp_path: Path) -> None:
    """Catches a finished run that aborts at exit now and then, under a thread of the reader's."""
    draw(tinyworld, tmp_path / "c")
    done = run_python("-c", READ_AND_COUNT_THREADS, str(tmp_path / "c" / PART))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


def test_drawing_holds_no_request_that_is_not_due(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a list or table of all samples, which a million of them would make large."""
    taken = 0

    def counting(_model: object, requests: Iterator[Request], *_: object, **__: object) -> None:
        nonlocal taken
        taken = len(list(islice(requests, 3)))
        assert isinstance(requests, Iterator)
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_module, "generate", counting)
    monkeypatch.setattr(corpus_module, "SAMPLES_PER_PART", 2**40)
    with pytest.raises(KeyboardInterrupt):
        draw_with(tinyworld, tmp_path / "c", replace(settings_for(tinyworld), num_samples=2**40))
    assert taken == 3


def test_contextual_samples_answer_their_prompts(tinyworld: Path, tmp_path: Path) -> None:
    """Catches sample i on another prompt when more are asked for, and prompts that got lost."""
    tokenizer = Tokenizer(tinyworld)
    texts = ["Sum: 5 + 6 =", "Copy: hammer window", "Sort: 3 1 2 =", "A"]
    prompts = Prompts([[tokenizer.seed_id, *tokenizer.encode(text)] for text in texts])
    base = replace(
        settings_for(tinyworld),
        prompt_ids=None,
        num_prompts=len(prompts),
        prompts=prompts.fingerprint(),
    )
    corpora = []
    for num_samples in (30, 50):
        out, settings = tmp_path / str(num_samples), replace(base, num_samples=num_samples)
        draw_with(tinyworld, out, settings, prompts=prompts)
        corpora.append(read_corpus(out))
    few, many = corpora
    assert ids_of(few) == ids_of(many)[:30]
    for sample in many.samples:
        prompt = sample.input_ids[: sample.num_prompt_tokens].tolist()
        assert prompt == [tokenizer.seed_id, *tokenizer.encode(texts[sample.index % 4])]
        assert len(sample.input_ids) == len(prompt) + len(sample.logprob_model)
    others = [Prompts([[0, 1], [2]]), Prompts([[0], [1, 2]]), Prompts([[0, 1, 2]])]
    assert len({p.fingerprint() for p in others}) == 3, "where a prompt ends counts"


def test_the_stored_head_comes_back(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches heads of another position or sample, and columns that nobody asked for."""
    real, drawn = draw_module.generate, {}

    def watching(*args: object, **kwargs: object) -> Iterator[Sample]:
        for sample in real(*args, **kwargs):  # type: ignore[arg-type]
            drawn[sample.index] = sample
            yield sample

    monkeypatch.setattr(draw_module, "generate", watching)
    out = tmp_path / "c"
    draw_with(tinyworld, out, replace(settings_for(tinyworld), store_topk=3))
    for sample in read_corpus(out).samples:
        head, expected = sample.topk, drawn[sample.index].topk
        assert head is not None
        assert head.ids.shape == (len(sample.logprob_model), 3)
        for name in ("ids", "logprobs", "rest_mass"):
            stored = getattr(head, name)
            assert np.array_equal(stored, getattr(expected, name)), name
            assert stored.dtype == (np.int32 if name == "ids" else np.float32)
    row = pq.read_table(out / PART).to_pylist()[4]
    assert row["topk_ids"] == drawn[24].topk.ids.tolist()
    assert [str(t) for t in pq.read_schema(out / PART).types[-3:]] == [
        "list<element: list<element: int32>>",
        "list<element: list<element: float>>",
        "list<element: float>",
    ]
    draw(tinyworld, tmp_path / "without")
    assert len(pq.read_schema(tmp_path / "without" / PART).names) == 7


def test_fingerprint_covers_every_setting(tinyworld: Path) -> None:
    """Catches a cache that returns the samples of another model, seed or temperature."""
    base = settings_for(tinyworld)
    others = [
        replace(base, model="x"),
        replace(base, num_samples=71),
        replace(base, prompt_ids=[1]),
        replace(base, dtype="bfloat16"),
        replace(base, prompt_ids=None, prompts="x"),
        replace(base, num_prompts=2),
        replace(base, store_topk=8),
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
