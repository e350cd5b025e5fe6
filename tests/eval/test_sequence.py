"""Stages before any of them trains: what each is given, what is refused, what --resume repeats."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cfs.assets import TINYWORLD_DIR
from cfs.cli import parse
from cfs.errors import UserError
from cfs.eval.sequence import RECORD, Stage, _begun_stages
from cfs.train.config import TrainConfig

STAGES = {"a.yaml": "skill: word_problem\n", "b.yaml": "skill: rotate\nsteps: 7\n"}


def begun(place: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, **files: str) -> list[Stage]:
    """The stages of a command line; `files` takes the place of b.yaml's content, or adds to it."""
    for name, content in (STAGES | {f"{n}.yaml": text for n, text in files.items()}).items():
        (place / name).write_text(content)
    arguments = ["--stages", str(place / "a.yaml"), str(place / "b.yaml"), *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return _begun_stages(parse(TrainConfig, ""))


def test_stages_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stage that starts from theta* again, or with a real checkpoint's defaults; a
    file's flags that lose against the command line; skills that a stage does not score."""
    out = str(tmp_path / "out")
    flags = ("--method", "l2-init", "--steps", "5", "--out", out)
    first, second = (s.config for s in begun(tmp_path, monkeypatch, *flags))
    assert (first.model, first.steps, first.skill) == (None, 5, "word_problem")
    assert (second.model, second.steps, second.skill) == (f"{out}/stage-1/model", 7, "rotate")
    assert second.lr == first.resolved("cpu", 256).lr
    assert first.method_option("init_model") is None
    assert second.method_option("init_model") == str(TINYWORLD_DIR)
    assert first.score_skills == second.score_skills == ["word_problem", "rotate"]


def test_a_given_anchor_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `--init-model` silently replaced in later stages."""
    flags = ("--method", "l2-init", "--init-model", "other", "--out", str(tmp_path / "out"))
    for stage in begun(tmp_path, monkeypatch, *flags):
        assert stage.config.method_option("init_model") == "other"


def test_a_file_may_name_an_option_of_the_command_lines_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that is judged without the command line, and a key with a dash passed over."""
    flags = ("--method", "lora", "--out", str(tmp_path / "out"))
    _, second = begun(tmp_path, monkeypatch, *flags, b="lora-rank: 4\nskill: rotate\n")
    assert second.config.method_option("lora_rank") == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("skil: rotate\n", "skil"),
        ("skill: rotates\n", "expected one of"),
        ("steps: many\n", "expected int"),
        ("out: x\n", "a stage has no out"),
        ("model: x\n", "leave model out"),
        ("method: pretrain\n", "starts from no model"),
        ("skill: [\n", "is no YAML"),
        ("- skill\n", "expected lines such as"),
        ("", "expected lines such as"),
    ],
)
def test_what_a_file_may_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    """Catches a wrong file that is found out when its turn comes, hours later, or not named."""
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"b\.yaml: .*{message}"):
        begun(tmp_path, monkeypatch, "--out", str(out), b=content)
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--synthetic", "--tuned"])
def test_what_belongs_to_one_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """Catches a corpus or a model of the first theta* that later stages are given too."""
    method = "cfs" if flag == "--synthetic" else "wise-ft"
    with pytest.raises(UserError, match=f"{flag}: belongs to one stage"):
        begun(tmp_path, monkeypatch, flag, "x", "--method", method, "--out", str(tmp_path / "o"))


def test_resuming_takes_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sequence that goes on with other flags than it began with, or takes a directory
    that holds something else."""
    out = tmp_path / "out"
    begin = ("--method", "l2", "--steps", "5", "--out", str(out))
    before = begun(tmp_path, monkeypatch, *begin)
    with pytest.raises(UserError, match="--resume goes on there"):
        begun(tmp_path, monkeypatch, *begin)
    again = begun(tmp_path, monkeypatch, *begin, "--resume", "--save-every", "2")
    assert [s.config.save_every for s in again] == [2, 2]
    assert [s.values["model"] for s in again[1:]] == [s.values["model"] for s in before[1:]]
    other = ("--method", "cfs", *begin[2:], "--resume")
    with pytest.raises(UserError, match=r"--method cfs for stage 1: .* began with l2"):
        begun(tmp_path, monkeypatch, *other)
    with pytest.raises(UserError, match="no --steps for stage 1"):
        begun(tmp_path, monkeypatch, *begin[:2], *begin[4:], "--resume")
    (out / RECORD).rename(out / "else")
    with pytest.raises(UserError, match="holds no stages"):
        begun(tmp_path, monkeypatch, *begin, "--resume")
