"""SIGTERM and SIGUSR1 as a wish to stop after the step in progress."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What batch systems send before a job's time ends; Slurm's `--signal` names either."""


class StopRequest:
    """Whether this process has been asked to stop. Ranks agree on it in their next sum."""

    def __init__(self) -> None:
        self.is_made = False

    def make(self, *_: object) -> None:
        self.is_made = True


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block the signals only note the wish; afterwards they do what they did before."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.make) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
