"""Progress for people and for logs."""

from __future__ import annotations

import pytest

from cfs import progress
from cfs.progress import Bar


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches control codes in logs, a line per step, or silence to the end."""
    with Bar("train", 3) as bar:
        for i in range(3):
            bar.advance(1, f"loss {i}")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train 3/3  0 s  loss 2"]
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Bar("train", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches as many bars as there are ranks."""
    with Bar("train", 1, enabled=False) as bar:
        bar.advance()
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bar that breaks where one can be shown."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Bar("train", 2) as bar:
        assert bar.display is not None
        bar.advance(2, "done")
        assert bar.display.tasks[0].finished
