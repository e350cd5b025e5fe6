"""Flags, YAML and one-line errors, without starting a process for each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cfs import cli
from cfs.cli import option, parse, run, save_yaml
from cfs.errors import UserError
from cfs.train.config import TrainConfig


@dataclass(frozen=True)
class Flags:
    some_rate: float = option(0.5, "a rate")
    name: str | None = option(None, "a name")
    kind: Literal["a", "b"] = option("a", "a kind")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    """Catches a config file that undoes what the command line says."""
    (tmp_path / "c.yaml").write_text("some_rate: 2.0\nname: file\n")
    file = str(tmp_path / "c.yaml")
    for arguments in (["--config", file, "--name", "flag"], ["--name", "flag", f"--config={file}"]):
        assert parse(Flags, "", arguments) == Flags(2.0, "flag", "a")
    assert parse(Flags, "", ["--name", "flag", "--config", file]).name == "flag"
    assert parse(Flags, "", []) == Flags()
    assert parse(Flags, "", ["--some-rate", "1e-3"]).some_rate == 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--some-rate", "fast"], "--some-rate fast: expected float"),
        (["--kind", "c"], "--kind c: expected a or b"),
        (["--other", "1"], "--other"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_flags_are_one_line(arguments: list[str], said: str) -> None:
    """Catches a parser's paragraph where a sentence belongs."""
    with pytest.raises(UserError) as caught:
        parse(Flags, "", arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    """Catches a misspelt setting that is silently ignored."""
    (tmp_path / "c.yaml").write_text("some_rat: 2.0\n")
    with pytest.raises(UserError, match="some_rat"):
        parse(Flags, "", ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("method", ["cfs", "ft", "pretrain"])
def test_a_resolved_config_reads_back(method: str, tmp_path: Path) -> None:
    """Catches a saved config that cannot be used, or resolves to something else again."""
    config = parse(TrainConfig, "", ["--method", method, "--out", "x"])
    config = config.resolved("cpu", 256).counted(6000)
    save_yaml(config, tmp_path / "c.yaml", ["a comment"])
    again = parse(TrainConfig, "", ["--config", str(tmp_path / "c.yaml")])
    assert again == config
    assert again.resolved("cpu", 256).counted(6000) == config


def test_steps_follow_from_epochs_over_the_task_alone() -> None:
    """The paper's control: the same gradient steps whatever is mixed in."""
    checkpoint = TrainConfig(model="some/model", data="d", format="text", epochs=2.0)
    assert checkpoint.resolved("cpu", 512).counted(6400).steps == 100
    assert checkpoint.resolved("cpu", 512).lr == 5e-6
    assert checkpoint.resolved("cuda", 512).dtype == "bfloat16"
    world = TrainConfig(epochs=1.0, batch_size=128).resolved("cpu", 256).counted(1280)
    assert world.steps == 10
    with pytest.raises(UserError, match="give one of them"):
        TrainConfig(steps=7, epochs=1.0)
    assert TrainConfig().resolved("cpu", 64).max_length == 64


def test_only_user_errors_lose_their_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches bugs of ours dressed up as mistakes of the user."""
    monkeypatch.setattr(cli, "leave", sys.exit)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(lambda: fail(UserError("--lr 0: expected above 0")))
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: --lr 0: expected above 0\n")
    with pytest.raises(ValueError, match="ours"):
        run(lambda: fail(ValueError("ours")))
