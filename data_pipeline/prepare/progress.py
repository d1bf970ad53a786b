"""Progress of a pass over the input, on standard error: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 15.0


class ByteProgress:
    def __init__(self, title: str) -> None:
        self._title = title
        self._done = 0
        self._started = self._said = monotonic()
        self._bar = tqdm(desc=title, unit="B", unit_scale=True, file=sys.stderr) if sys.stderr.isatty() else None

    def advance(self, size: int) -> None:
        """Count `size` more bytes of text."""
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
        elif monotonic() - self._said > LINE_SECONDS:
            self._said = monotonic()
            rate = self._done / (self._said - self._started) / 1e6
            print(f"{self._title}: {self._done / 1e6:,.0f} MB, {rate:.1f} MB/s", file=sys.stderr, flush=True)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
