"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing off rank 0."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """`with Bar("train", total) as bar: bar.advance(1, "loss 2.31")`."""

    def __init__(self, title: str, total: int, enabled: bool = True, first: int = 0) -> None:
        self.title, self.total, self.enabled = title, total, enabled
        self.first = self.done = first
        self.started = self.printed = time.monotonic()
        self.display: Progress | None = None
        if enabled and sys.stderr.isatty():
            self.display = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.task = self.display.add_task(title, total=total, completed=first, note="")

    def __enter__(self) -> Bar:
        if self.display is not None:
            self.display.start()
        return self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more and show `note`; without a terminal a line every few seconds."""
        self.done += amount
        if self.display is not None:
            self.display.update(self.task, completed=self.done, note=note)
        elif self.enabled:
            now = time.monotonic()
            if now - self.printed >= SECONDS_BETWEEN_LINES or self.done >= self.total:
                self.printed = now
                elapsed = now - self.started
                left = elapsed / max(self.done - self.first, 1) * (self.total - self.done)
                shown = f"{elapsed:.0f} s" + (f", {left:.0f} s left" if left else "")
                print(f"{self.title} {self.done}/{self.total}  {shown}  {note}", flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.display is not None:
            self.display.stop()
