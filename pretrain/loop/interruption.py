"""Turn a signal to stop into a request that the loop obeys between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType

# If ranks receive different signals, the first one here wins: a launcher passes Ctrl-C on as SIGTERM.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While its `with` block runs, Ctrl-C and SIGTERM ask for a stop after the current step.

    A second Ctrl-C, at least a second later, stops at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the first one received
        self.came_at = 0.0
        self.previous: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        self.previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes the terminal's Ctrl-C on as a SIGTERM, so one key press can arrive twice.
        if self.signal is None:
            self.signal, self.came_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.came_at > 1:
            raise KeyboardInterrupt
