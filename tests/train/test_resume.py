"""A run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cfs.data import tinyworld
from cfs.errors import NonFiniteError, UserError
from cfs.model import save_model
from cfs.train import loop
from cfs.train.checkpoint import latest, read_facts
from cfs.train.loop import train
from cfs.train.metrics import CLOCKED
from tests.conftest import REPOSITORY, read_metrics, run_python, tiny_model
from tests.train.runs import STEPS, make_run, random_examples, same, weights


class Killed(BaseException):
    """What stands for the end of the process."""


def killed_before(step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the process die when it is about to take `step`, counted from 0."""
    take_step = loop.take_step

    def take(run: Any, number: int, request: Any) -> Any:
        if number == step:
            raise Killed
        return take_step(run, number, request)

    monkeypatch.setattr(loop, "take_step", take)


def unclocked(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_metrics(run)]


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw8bit"},
        {"optimizer": "adamw", "masters": "bfloat16", "dtype": "bfloat16"},
    ],
    ids=["adamw", "adamw8bit", "bfloat16-masters"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a state that a checkpoint forgets, stopped before, between and after all steps: in
    the middle of epochs, where one ends, and where the run does."""
    whole = make_run(tmp_path, "whole", **flags)
    assert train(whole)
    expected = weights(whole)
    for stop in range(STEPS + 1):
        name = f"stop-{stop}"
        with monkeypatch.context() as patched:
            if stop == 0:
                killed_before(0, patched)
                with pytest.raises(Killed):
                    train(make_run(tmp_path, name, **flags))
            else:
                assert train(make_run(tmp_path, name, stop_after=stop, **flags)) is (stop == STEPS)
        resumed = make_run(tmp_path, name, **flags)
        assert resumed.progress.step == stop
        assert train(resumed)
        assert same(weights(resumed), expected), stop
        assert unclocked(tmp_path / name) == unclocked(tmp_path / "whole"), stop


def test_a_killed_run_loses_what_came_after_its_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches metrics of lost steps that stand twice."""
    whole = make_run(tmp_path, "whole")
    train(whole)
    with monkeypatch.context() as patched:
        killed_before(10, patched)
        with pytest.raises(Killed):
            train(make_run(tmp_path, "killed"))
    assert read_metrics(tmp_path / "killed")[-1]["step"] == 10
    resumed = make_run(tmp_path, "killed")
    assert resumed.progress.step == 8
    train(resumed)
    assert same(weights(resumed), weights(whole))
    assert unclocked(tmp_path / "killed") == unclocked(tmp_path / "whole")


def test_other_examples_are_not_gone_on_with(tmp_path: Path) -> None:
    """Catches a data file that changed while the run lay still."""
    train(make_run(tmp_path, "run", stop_after=2))
    with pytest.raises(UserError, match="began with other examples"):
        make_run(tmp_path, "run", seed=1)


def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path) -> None:
    """Catches NaN in the weights, a checkpoint of them, and a batch that cannot be found."""
    base = poisoned_base(tmp_path)
    examples = random_examples(16, 1, 4)
    culprit = examples[11]
    culprit.input_ids[5] = POISON
    run = make_run(tmp_path, "run", base=base, task=examples, l2=0.0)
    batches = [run.mixture.batch(step) for step in range(STEPS)]
    met = next(k for k, draws in enumerate(batches) if any(d.example is culprit for d in draws))
    with pytest.raises(NonFiniteError) as caught:
        train(run)
    assert caught.value.exit_code == 3
    said = str(caught.value)
    assert said.startswith(f"step {met + 1}: loss nan, gradient norm nan; the step was not taken")
    assert all(draw.id in said for draw in batches[met])
    assert "Not finite by itself: task.jsonl record 12." in said
    path = latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert read_facts(path)["progress"]["step"] == met
    again = weights(make_run(tmp_path, "run", base=base, task=examples, l2=0.0))
    assert all(bool(value.isfinite().all()) for value in again.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Catches a checkpoint that can only fail again, which rotation puts in place of good ones."""
    with pytest.raises(NonFiniteError, match="the weights are not finite") as caught:
        train(make_run(tmp_path, "run", l2=0.0, lr=1e38, clip=0.0, warmup=0.0, save_every=1))
    assert caught.value.exit_code == 3
    path = latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    again = weights(make_run(tmp_path, "run", l2=0.0, lr=1e38, clip=0.0, warmup=0.0))
    assert all(bool(value.isfinite().all()) for value in again.values())


POISON = 96


def poisoned_base(place: Path) -> Path:
    """A model that cannot read one of its tokens, and never writes it."""
    model = tiny_model("olmo")
    with torch.no_grad():
        model.embed_tokens.weight[POISON] = torch.tensor([3e38, -3e38]).repeat(16)
    save_model(model, place / "poisoned")
    return place / "poisoned"


TRAIN = [
    *("train.py", "--method", "ft", "--format", "tinyworld", "--steps", "12"),
    *("--batch-size", "16", "--save-every", "4", "--kl-samples", "16", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    items = tinyworld.task_items(100, 0)
    file.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items))
    return file


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_two_ranks_resume_as_one_and_one_as_two(
    optimizer: str, task_file: Path, tmp_path: Path
) -> None:
    """Catches states cut at the wrong place, and an order of the data that counts ranks."""
    flags = [*TRAIN, "--data", str(task_file), "--corpora", str(tmp_path / "corpora")]
    flags += ["--optimizer", optimizer, "--l2", "1e-3"]

    def run(name: str, ranks: int, *more: str) -> Path:
        done = run_python(*flags, "--out", str(tmp_path / name), *more, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / name

    for before, after in ((2, 1), (1, 2)):
        whole = unclocked(run(f"whole-{before}", before))
        name = f"{before}-as-{after}"
        stopped = run(name, before, "--stop-after", "6")
        assert not (stopped / "model").exists()
        lines = unclocked(run(name, after, "--resume"))
        assert [line["step"] for line in lines] == [line["step"] for line in whole]
        for line, expected in zip(lines, whole, strict=True):
            assert line.get("targets_task") == expected.get("targets_task")
            if "loss" in expected:
                assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5), line["step"]
            if "kl_nats" in expected:  # of whole sequences, some sixty tokens each
                assert line["kl_nats"] == pytest.approx(expected["kl_nats"], abs=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_the_step_and_exits_resumable(
    ranks: int, task_file: Path, tmp_path: Path
) -> None:
    """Catches a signal that loses the steps since the last checkpoint, or ends in a traceback."""
    out = tmp_path / "run"
    flags = [*TRAIN, "--data", str(task_file), "--corpora", str(tmp_path / "corpora")]
    flags += ["--out", str(out), "--steps", "2000", "--save-every", "1000", "--resume"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*command, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *flags], cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: (out / "metrics.jsonl").is_file() and len(read_metrics(out)) > 4, process)
    process.terminate()
    said, complained = (text.decode() for text in process.communicate(timeout=120))
    # torchrun reports the signal that it got itself, whatever its ranks made of it.
    assert (process.returncode == 0) is (ranks == 1), complained
    stopped = re.search(r"stopped after step (\d+) of 2000, which is saved", said)
    assert stopped is not None, said + complained
    path = latest(out / "checkpoints")
    assert path is not None
    assert path.name == f"step-{int(stopped[1]):06d}"
    assert read_metrics(out)[-1]["step"] == int(stopped[1])
    assert "Traceback" not in complained or ranks == 2, complained
    if ranks == 1:
        more = str(int(stopped[1]) + 2)
        done = run_python("train.py", "--resume", "--out", str(out), "--stop-after", more)
        assert f"stopped after step {more} of 2000" in done.stdout, done.stderr


def wait_until(has_come: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not has_come():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_interleaved_files_train_together(task_file: Path, tmp_path: Path) -> None:
    """Catches shares that never reach the mixture."""
    text = tmp_path / "notes.jsonl"
    text.write_text("".join(json.dumps({"text": f"note {i}"}) + "\n" for i in range(20)))
    flags = [f for f in TRAIN if f not in ("--format", "tinyworld")]
    flags += ["--interleave", f"{task_file}:tinyworld=0.75", f"{text}:text=0.25"]
    flags += ["--corpora", str(tmp_path / "corpora"), "--out", str(tmp_path / "run")]
    done = run_python(*flags)
    assert done.returncode == 0, done.stderr
    assert "120 of 120 records" in done.stdout
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12
