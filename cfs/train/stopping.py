"""SIGTERM and SIGUSR1 as a wish to stop after the step in progress."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cfs.cli import STOPPING, Terminated


class StopRequest:
    """Whether this process has been asked to stop. Ranks agree on it in their next sum."""

    def __init__(self) -> None:
        self.is_made = self.is_granted = False

    def make(self, *_: object) -> None:
        self.is_made = True


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within the block the signals only note the wish; afterwards they do what they did before.

    A wish that came too late for any step is granted on the way out, by `Terminated`.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request.make) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if request.is_made and not request.is_granted:
        raise Terminated
