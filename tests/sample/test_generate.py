"""`generate.py` as a person runs it: flags, prompts, signals, damage, and what it prints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import generate
from cfs import cli
from cfs.cli import run
from cfs.data.formats import make_examples, read_records
from cfs.data.prompts import context_prompts, seed_prompt
from cfs.data.tokenizer import Tokenizer
from cfs.errors import UserError
from cfs.sample.corpus import read_corpus
from cfs.sample.preview import preview
from cfs.sample.sample import Sample
from tests.conftest import REPOSITORY, run_python

RECORDS = [
    {"prompt": "Sum: 5 + 6 =", "response": " 11"},
    {"prompt": "Copy: hammer window", "response": " = hammer window"},
    {"prompt": "Problem: Iris has 65 apples. Answer:", "response": " The answer is 65."},
]
NUM_PROMPTS = len(RECORDS)
SHORT = ["--max-tokens", "12", "--device", "cpu"]


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    file = tmp_path / "contexts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def call(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    """The exit code of `generate.py` with these flags, run in this process."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    monkeypatch.setattr(cli, "leave", sys.exit)
    with pytest.raises(SystemExit) as caught:
        run(generate.main)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_contextual_prompts_are_those_of_training(
    contexts: Path, tmp_path: Path, tinyworld: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a prompt that lacks the seed token, or is tokenised otherwise than in training."""
    flags = ["--contexts", contexts, "--format", "prompt-response", "--samples-per-prompt", 4]
    assert call(monkeypatch, "--out", tmp_path / "c", *flags, *SHORT) == 0
    corpus = read_corpus(tmp_path / "c")
    assert len(corpus.samples) == 4 * NUM_PROMPTS
    records = read_records(contexts, "prompt-response")
    examples = make_examples(records, Tokenizer(tinyworld), max_length=128)
    for sample in corpus.samples:
        example = examples[sample.index % NUM_PROMPTS]
        prompt = example.input_ids[: int(example.target_mask.argmax())]
        assert sample.input_ids[: sample.num_prompt_tokens].tolist() == prompt.tolist()
    settings = corpus.manifest["settings"]
    assert settings["sampling"]["temperature"] == 0.6, "the paper's for contextual samples"
    assert settings["sampling"]["top_p"] == 0.95
    assert settings["num_prompts"] == NUM_PROMPTS
    assert settings["prompt_ids"] is None
    assert call(monkeypatch, "--out", tmp_path / "d", "--num-samples", 5, *flags[:4], *SHORT) == 0
    few = read_corpus(tmp_path / "d").samples
    assert [s.input_ids.tolist() for s in few] == [s.input_ids.tolist() for s in corpus.samples[:5]]


@pytest.mark.parametrize(
    ("seed_text", "text"),
    [(None, None), ("bos", None), ("newline", "\n"), ("space", " "), ("Sum: 5", "Sum: 5")],
)
def test_the_seed_takes_the_place_of_the_seed_token(
    seed_text: str | None,
    text: str | None,
    tmp_path: Path,
    tinyworld: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a seed text that is ignored, or put after the seed token."""
    flags = [] if seed_text is None else ["--seed-text", seed_text]
    assert call(monkeypatch, "--out", tmp_path / "c", "--num-samples", 3, *SHORT, *flags) == 0
    corpus = read_corpus(tmp_path / "c")
    tokenizer = Tokenizer(tinyworld)
    expected = [tokenizer.seed_id] if text is None else tokenizer.encode(text)
    for sample in corpus.samples:
        assert sample.input_ids[: sample.num_prompt_tokens].tolist() == expected
    assert corpus.manifest["settings"]["prompt_ids"] == expected
    assert corpus.manifest["settings"]["sampling"]["temperature"] == 1.0


def test_newline_and_space_are_one_token(stories260k: Path) -> None:
    """Catches the space that a tokenizer of the Llama kind puts before every text."""
    tokenizer = Tokenizer(stories260k)
    newline, space = (seed_prompt(name, tokenizer) for name in ("newline", "space"))
    assert (len(newline), len(space)) == (1, 1)
    assert newline != space
    assert tokenizer.backend.id_to_token(newline[0]) in ("\n", "<0x0A>")


def test_a_seed_that_leaves_no_token(tinyworld: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a prompt of no tokens, which nothing can continue."""
    tokenizer = Tokenizer(tinyworld)
    monkeypatch.setattr(tokenizer, "encode", lambda _text: [])
    for seed_text in ("newline", "dropped"):
        with pytest.raises(UserError, match=f"--seed-text '{seed_text}'"):
            seed_prompt(seed_text, tokenizer)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--seed-text=", "--seed-text '': the tokenizer makes no token of it"),
        ("--num-samples 0", "--num-samples 0: expected at least 1"),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--batch-size 70000", "--batch-size 70000: expected at most 65536"),
        ("--max-tokens 0", "--max-tokens 0: expected at least 1"),
        ("--store-topk -1", "--store-topk -1: expected at least 0"),
        ("--store-topk 955", "--store-topk 955: the vocabulary has 954"),
        ("--preview -1", "--preview -1: expected at least 0"),
        ("--max-tokens 256", "the seed has 1 token, which with --max-tokens 256 exceeds"),
        ("--temperature -1", "--temperature -1.0: expected 0"),
        ("--top-p 0", "--top-p 0.0: expected in (0, 1]"),
        ("--samples-per-prompt 2", "no prompts without --contexts"),
        ("--contexts CONTEXTS", "--contexts and --format go together"),
        ("--format gsm8k", "--contexts and --format go together"),
        ("--contexts CONTEXTS --format magic", "--format 'magic' is unknown; known: prompt"),
        ("--contexts CONTEXTS --format gsm8k", "row 1 has no field 'question'"),
        ("--contexts nowhere.jsonl --format text", "--contexts nowhere.jsonl: no such file"),
        ("--contexts CONTEXTS --format prompt-response --seed-text bos", "give one of them"),
        (
            "--contexts CONTEXTS --format prompt-response --num-samples 2 --samples-per-prompt 1",
            "--samples-per-prompt and --num-samples both say how many",
        ),
        (
            "--contexts CONTEXTS --format prompt-response --max-tokens 248",
            "record 3: its prompt has 11 tokens, which with --max-tokens 248 exceeds the model's "
            "context of 256; use --max-tokens 245 or less, or remove the records with longer "
            "prompts (1 of 3)",
        ),
        ("--repair", "holds no corpus"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    flags: str,
    said: str,
    contexts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches tracebacks, and directories made before the input was read."""
    words = flags.replace("CONTEXTS", str(contexts)).split(" ")
    assert call(monkeypatch, "--out", tmp_path / "out", "--device", "cpu", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_texts_without_prompts_are_no_contexts(tmp_path: Path, tinyworld: Path) -> None:
    """Catches "contextual" samples that are context-free at another temperature."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="has no prompts, only texts"):
        context_prompts(str(file), "text", Tokenizer(tinyworld))


def test_a_complete_corpus_is_checked_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second run that draws again, trusts damage, or does not say how to mend it."""
    out = tmp_path / "c"
    flags = ["--out", out, "--num-samples", 300, *SHORT]
    assert call(monkeypatch, *flags) == 0
    first = capsys.readouterr().out
    assert "300 samples context-free, at most 12 tokens each" in first
    assert "speed of this run" in first
    assert call(monkeypatch, *flags) == 0
    assert "was already complete, and every part is intact" in capsys.readouterr().out
    part = out / "part-00001.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:100] + b"?" + content[101:])
    assert call(monkeypatch, *flags) == 2
    captured = capsys.readouterr()
    assert "part-00001.parquet: is damaged" in captured.err
    assert "--repair" in captured.err
    assert captured.err.count("\n") == 1
    assert "intact" not in captured.out
    assert call(monkeypatch, *flags, "--repair") == 0
    assert "repaired part-00001.parquet" in capsys.readouterr().out
    assert call(monkeypatch, *flags, "--repair") == 0
    assert "already complete" in capsys.readouterr().out


def test_a_preview_cannot_act_on_the_terminal(
    tinyworld: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches a sample that clears the screen, retitles the window or reverses what is read."""
    tokenizer = Tokenizer(tinyworld)
    nasty = "a\x1b[2Jb\x07\rc\u202ed\x9be\nf [red]x"
    prompt = [tokenizer.seed_id, *tokenizer.encode("Q\x1b?")]
    ids = np.array(prompt + tokenizer.encode(nasty), dtype=np.int32)
    logprobs = np.zeros(len(ids) - len(prompt), dtype=np.float32)

    def decode(ids: list[int]) -> str:
        return tokenizer.backend.decode(ids, skip_special_tokens=False)

    shown = preview(Sample(7, ids, len(prompt), logprobs, logprobs, "length"), decode)
    assert all(c == "\n" or c.isprintable() for c in shown)
    for part in (
        "sample 7",
        "length",
        r"<|endoftext|>Q\x1b?",
        r"a\x1b[2Jb\x07\rc\u202ed",
        "[red]x",
    ):
        assert part in shown
    flags = ["--out", tmp_path / "c", "--num-samples", 4, "--preview", 2, *SHORT]
    assert call(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "sample 1 (" in printed
    assert "sample 2 (" not in printed


def test_sigterm_stops_cleanly(tmp_path: Path) -> None:
    """Catches a temporary file left behind, a traceback, or an exit code that says success."""
    out = tmp_path / "c"
    flags = ["--out", str(out), "--num-samples", "20000", "--max-tokens", "12"]
    process = subprocess.Popen(
        [sys.executable, "generate.py", *flags, "--device", "cpu"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(out.glob("part-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143
    assert errors == "generate.py: stopped by SIGTERM; run again to resume\n"
    left = [file.name for file in out.iterdir()]
    assert not any(".tmp-" in name for name in left)
    assert any(name.endswith(".parquet") for name in left)
    assert "manifest.json" not in left


FAILING = """
import errno, os, sys, time
import pyarrow.parquet as pq
sys.path.insert(0, {repository!r})
import generate
from cfs.cli import run
real = pq.write_table
def write_table(table, where):
    real(table, where)
    if os.environ["RANK"] == "1":
        time.sleep(float(os.environ["PAUSE"]))
        raise OSError(errno.ENOSPC, "Error writing bytes to file")
pq.write_table = write_table
run(generate.main, resumes="run again")
"""


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    """Catches ranks that wait forever for one that met a full disk, or hide why.

    Rank 0 is done by then, and waits: what it is told by the closed connection is no traceback.
    """
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(repository=str(REPOSITORY)))
    flags = ["--out", str(tmp_path / "c"), "--num-samples", "512", *SHORT]
    done = run_python(str(script), *flags, ranks=2, PAUSE="3")
    assert done.returncode != 0
    said = "failing.py (rank 1): error: "
    line = next(line for line in done.stderr.splitlines() if line.startswith(said))
    assert "part-00001.parquet: cannot be written (No space left on device)" in line
    assert "failing.py: error: another rank ended; its message says why" in done.stderr
    assert "[rank0]" not in done.stderr, "no traceback of ours"
    assert not any(".tmp-" in file.name for file in (tmp_path / "c").iterdir())
    again = run_python("generate.py", *flags)
    assert again.returncode == 0, again.stderr
    assert "256 samples in" in again.stdout, "rank 0's part stayed"


def test_killed_at_random_moments_nothing_is_lost() -> None:
    """Catches rows lost, doubled or changed by kill -9 (bench/kill.py, which kills more)."""
    done = run_python("bench/kill.py", "--kills", "3", "--num-samples", "768", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "768" in done.stdout


def test_every_flag_has_a_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a flag that `--help` does not explain, or a default that it hides."""
    assert call(monkeypatch, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "default: 1.0, with --contexts 0.6",
        "nucleus probability [0.95]",
        "--contexts FILE",
        "default: 511, or what the context leaves",
    ):
        assert said in text
