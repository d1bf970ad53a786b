"""Progress of a pass over bytes, on standard error: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
from threading import Lock
from time import monotonic
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 15.0


class ByteProgress:
    """`total` bytes, if that is known, tell how much time is left."""

    def __init__(self, title: str, total: int | None = None) -> None:
        self._title, self._total = title, total
        self._done = 0
        self._started = self._said = monotonic()
        self._lock = Lock()
        self._bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, file=sys.stderr) if sys.stderr.isatty() else None

    def advance(self, size: int) -> None:
        """Count `size` more bytes. Any thread may call it."""
        with self._lock:
            self._done += size
            if self._bar is not None:
                self._bar.update(size)
            elif monotonic() - self._said > LINE_SECONDS:
                self._said = monotonic()
                print(f"{self._title}: {self._line(self._said - self._started)}", file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        if self._total is None:
            return f"{self._done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        left = (self._total - self._done) / rate
        return f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left:,.0f} s left"

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
