"""Signs of life that ranks exchange, why a run ends, and how a process ends at once."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType

import torch.distributed as dist

from pretrain.distributed.rendezvous import PACKAGES, ROOT, ranks_text

SHOWN_LINES = 16
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
WAITING = (str(Path(__file__).with_name("watchdog.py")), __file__)  # a thread in these files waits for the end of the run


@dataclass(frozen=True)
class Sign:
    """A sign of life."""

    number: int
    step: int  # finished
    idle: float  # seconds in which nothing has moved, on any rank of the machine if it is the machine's first
    where: str  # the main thread is
    broken: bool = False  # its communication with another rank broke
    left: bool = False  # it has done its work

    @classmethod
    def read(cls, text: bytes) -> Sign:
        """What was posted; before that, a sign of number 0."""
        return cls(**json.loads(text)) if text else cls(0, 0, 0.0, "the start")

    def __str__(self) -> str:
        return f"after step {self.step} in {self.where}" if self.step else f"before its first step in {self.where}"


@dataclass(frozen=True)
class End:
    """Why the run ends."""

    speaker: int
    machine: str  # of the speaker
    text: str  # for people, without `error:`
    status: int = 1
    lost: int | None = None  # a rank
    report: bool = False  # it matters where the others are


def broke(error: BaseException) -> bool:
    """Whether it tells of broken communication with another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(mark in str(error) for mark in BROKEN))


def standings(signs: Mapping[int, Sign]) -> str:
    """A line for each place where ranks are."""
    places: dict[str, list[int]] = {}
    for rank, sign in signs.items():
        places.setdefault(str(sign), []).append(rank)
    lines = [f"  {ranks_text(ranks)} {'is' if len(ranks) == 1 else 'are'} {place}" for place, ranks in places.items()]
    if len(lines) > SHOWN_LINES:
        lines[SHOWN_LINES:] = [f"  and {len(lines) - SHOWN_LINES} other places"]
    return "".join(line + "\n" for line in lines)


def where_main_thread_is() -> str:
    """Its innermost line in this project."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = []
    while frame is not None:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return _innermost(lines[::-1])


def where_raised(trace: TracebackType | None) -> str:
    """The innermost line in this project that an exception passed."""
    lines = []
    while trace is not None:
        lines.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return _innermost(lines)


def _innermost(lines: Sequence[tuple[CodeType, int]]) -> str:
    for code, line in reversed(lines):
        path = Path(code.co_filename)
        ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
        if ours and code.co_filename not in WAITING:
            return f"{path.relative_to(ROOT)}:{line} {code.co_name}"
    return "code that is not of this project"


def write(text: str) -> None:
    """To standard error, past Python's own stream, whose lock the main thread may hold."""
    data = text.encode()
    with suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def end_process(status: int) -> None:
    """End this process at once: at a usual end the threads of process groups may abort it or wait for others."""
    flusher = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may hold the stream's lock
    flusher.start()
    flusher.join(0.5)
    os._exit(status)
