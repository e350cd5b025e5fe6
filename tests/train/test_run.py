"""`train.py` as a person runs it: short runs, on one rank and two, with good and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cfs.errors import UserError
from cfs.model import load_model
from cfs.train.config import TrainConfig
from cfs.train.metrics import CLOCKED
from cfs.train.sources import task_records
from tests.conftest import SHARED_DATA, read_metrics, run_python

SHORT = ["--steps", "6", "--batch-size", "16", "--kl-samples", "64", "--skill-items", "20"]


def train(tmp_path: Path, name: str, *flags: str, ranks: int = 1) -> Path:
    out = tmp_path / name
    corpora = str(tmp_path / "corpora")
    done = run_python(
        "train.py", "--out", str(out), "--corpora", corpora, "--device", "cpu", *flags, ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_main_job_leaves_what_it_promises(tmp_path: Path) -> None:
    """Catches a missing file, a metric of the wrong name, a summary that others cannot read."""
    out = train(tmp_path, "run", "--synthetic-ratio", "0.02", *SHORT)
    assert {f.name for f in out.iterdir()} - {".lock"} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "summary.json",
        "training.svg",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["kl_nats"] > 0
    assert summary["kl_se"] > 0
    assert set(summary["skills"]["copy"]) >= {"base", "tuned"}
    metrics = read_metrics(out)
    assert [m["step"] for m in metrics] == list(range(7))
    assert abs(metrics[0]["kl_nats"]) < 1e-3, "before the first step the model is the base"
    for line in metrics[1:]:
        total = line["targets_task"] + line["targets_synthetic"]
        terms = line["nll_task"] * line["targets_task"]
        terms += (line["nll_synthetic"] or 0) * line["targets_synthetic"]
        assert line["loss"] == pytest.approx(terms / total, rel=1e-5)
    assert summary["targets_task"] == sum(m["targets_task"] for m in metrics[1:])
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["steps"] == 6
    assert config["lr"] == 1e-3
    load_model(out / "model")


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Catches a rank that sees other data, drops its gradient, or scales it."""
    flags = ["--synthetic-ratio", "0.02", "--lr", "1e-3", *SHORT]
    one, two = train(tmp_path, "one", *flags), train(tmp_path, "two", *flags, ranks=2)
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        for key in ("loss", "nll_task", "nll_synthetic", "kl_nats", "kl_se"):
            if a.get(key) is not None:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), key
        assert a.get("targets_task") == b.get("targets_task")
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_the_corpus_is_drawn_once_and_a_config_repeats_a_run(tmp_path: Path) -> None:
    """Catches a cache never hit, and a saved config that gives another run."""
    one = train(tmp_path, "one", "--synthetic-ratio", "0.02", *SHORT)
    corpora = sorted(f.name for f in (tmp_path / "corpora").iterdir())
    stamps = [f.stat().st_mtime_ns for f in sorted((tmp_path / "corpora").rglob("*.parquet"))]
    assert len(corpora) == 2, "the training corpus and the held-out one"
    two = train(tmp_path, "two", "--config", str(one / "config.yaml"))
    assert sorted(f.name for f in (tmp_path / "corpora").iterdir()) == corpora
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "corpora").rglob("*.parquet"))] == (
        stamps
    )
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert {k: v for k, v in a.items() if k not in CLOCKED} == {
            k: v for k, v in b.items() if k not in CLOCKED
        }


def test_ft_uses_no_samples_but_measures_the_kl(tmp_path: Path) -> None:
    """Catches synthetic targets in plain fine-tuning."""
    out = train(tmp_path, "ft", "--method", "ft", *SHORT)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["targets_synthetic"] == 0
    assert summary["kl_nats"] > 0
    assert len(list((tmp_path / "corpora").iterdir())) == 1


def test_pretraining_starts_from_seeded_random_weights(tmp_path: Path) -> None:
    """Catches pretraining that starts from the shipped weights, or is not reproducible."""
    flags = ["--method", "pretrain", *SHORT]
    one, two = train(tmp_path, "one", *flags), train(tmp_path, "two", *flags)
    first = read_metrics(one)[0]
    assert first["loss"] == pytest.approx(np.log(load_model(one / "model").config.vocab_size), 0.05)
    a, b = load_model(one / "model"), load_model(two / "model")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not (tmp_path / "corpora").exists()


def test_bfloat16_compute_keeps_float32_masters(tmp_path: Path) -> None:
    """Catches updates lost to bfloat16 weights, which would look like less forgetting."""
    flags = ["--method", "ft", "--dtype", "bfloat16", "--lr", "1e-5", *SHORT]
    out = train(tmp_path, "run", *flags)
    tuned, base = load_model(out / "model"), load_model(Path("cfs/assets/tinyworld"))
    moved = [
        float((p != q).float().mean())
        for p, q in zip(tuned.parameters(), base.parameters(), strict=True)
    ]
    assert next(tuned.parameters()).dtype == torch.float32
    assert np.mean(moved[1:]) > 0.95
    embedding = tuned.embed_tokens.weight
    assert not torch.equal(embedding, embedding.bfloat16().float()), "saved from the masters"


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs shared/data beside the repository")
def test_real_model_on_real_data_reloads_in_transformers(tmp_path: Path) -> None:
    """Catches a main job that only knows its own toy: stories260k on GSM8K."""
    transformers = pytest.importorskip("transformers")
    out = train(
        tmp_path,
        "run",
        *("--model", str(SHARED_DATA / "stories260k")),
        *("--data", str(SHARED_DATA / "gsm8k" / "train.jsonl"), "--format", "gsm8k"),
        *("--max-length", "256", "--steps", "4", "--batch-size", "8"),
        *("--synthetic-ratio", "0.005", "--kl-samples", "16", "--lr", "1e-3"),
    )
    ids = torch.randint(3, 512, (2, 64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(out / "model")(ids), theirs(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(out / "model")("a b").input_ids
    assert json.loads((out / "summary.json").read_text())["skills"] == {}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "magic"], "'magic' is unknown"),
        (["--model", "no/where/at/all"], "no/where/at/all"),
        (["--data", "nowhere.jsonl"], "--format"),
        (["--data", "nowhere.jsonl", "--format", "text"], "nowhere.jsonl: no such file"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "fast"], "lr"),
        (["--steps", "0"], "--steps 0"),
        (["--top-p", "1.5"], "--top-p"),
        (["--synthetic", "nowhere"], "nowhere"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--normalize", "both"], "normalize"),
        (["--out", "README.md"], "README.md"),
        (["--out", "tests"], "not empty"),
        (["--max-length", "1000"], "context is 256"),
        (["--synthetic-ratio", "0.00001"], "less than one sample"),
        (["--seed", "-1"], "--seed -1"),
        (["--epochs", "2"], "give one of them"),
        (["--format", "text"], "go together"),
        (["--method", "ft", "--synthetic", "x"], "mixes no samples in"),
        (["--corpora", "README.md"], "README.md"),
        (["--interleave", "a.jsonl"], "FILE:FORMAT=WEIGHT"),
        (["--interleave", "a.jsonl:text=0"], "a weight above 0"),
        (["--interleave", "a.jsonl:text=1"], "--interleave a.jsonl: no such file"),
        (["--method", "pretrain", "--l2", "1"], "pretrain goes alone"),
        (["--keep", "0"], "--keep 0"),
        (["--attention", "flash"], "--attention flash: needs CUDA"),
        (["--wandb", "x"], "pip install wandb"),
        (["--synthetic", "x", "--top-p", "1"], "the corpus is drawn"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: list[str], said: str, tmp_path: Path) -> None:
    """Catches tracebacks, and work begun before the input was read."""
    out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
    done = run_python("train.py", "--device", "cpu", *SHORT, *flags, *out)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "run").glob("*")), "the same --out can be used again"


def test_resume_needs_a_directory() -> None:
    """Catches a run that resumes whichever directory comes next."""
    with pytest.raises(UserError, match="needs --out"):
        TrainConfig(resume=True)


def test_pretraining_needs_steps() -> None:
    """Catches a count of documents that nothing decides."""
    with pytest.raises(UserError, match="give --steps"):
        TrainConfig(method="pretrain", epochs=2.0)
    with pytest.raises(UserError, match="give --steps"):
        task_records(TrainConfig(method="pretrain", model="another").resolved("cpu", 256))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """Catches a run that goes on with NaN and ends as if all were well."""
    flags = ["--method", "ft", "--lr", "1e30", "--clip", "0", "--device", "cpu", *SHORT]
    done = run_python("train.py", "--out", str(tmp_path / "run"), *flags)
    assert done.returncode == 3
    assert "the step was not taken. Its examples: TinyWorld record" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_corpus_of_another_model_is_refused(tmp_path: Path) -> None:
    """Catches samples that estimate the KL to the wrong model."""
    first = train(tmp_path, "first", "--method", "ft", *SHORT)
    other = tmp_path / "corpus"
    flags = ["--num-samples", "16", "--max-tokens", "20", "--device", "cpu"]
    done = run_python("generate.py", "--model", str(first / "model"), "--out", str(other), *flags)
    assert done.returncode == 0, done.stderr
    done = run_python("train.py", "--synthetic", str(other), "--out", str(tmp_path / "x"), *SHORT)
    assert done.returncode == 2
    assert "another model" in done.stderr
