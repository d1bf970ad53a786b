"""Ends a run of several processes when one of them is lost or nothing moves, and says once which and where all stood.

A thread of each process posts a sign of life to the store every second (see pretrain/rendezvous.py) and looks for those of
the next two ranks and of rank 0; rank 0 looks for all. Whoever finds a fault claims the right to speak under the key `end`;
all others read it there and end, too. A second thread notices when the store itself does not answer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import ParallelConfig
from pretrain.rendezvous import PACKAGES, ROOT, Meeting, Place, ranks_text

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

PERIOD = 1.0  # seconds between signs of life
SUSPICIOUS_AFTER = 10.0  # seconds of silence that are enough once communication with someone broke
SHOWN_LINES = 16
BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
INTERRUPTED = 130


@dataclass(frozen=True)
class Sign:
    """A sign of life."""

    number: int
    step: int  # finished
    idle: float  # seconds in which nothing has moved
    where: str  # the main thread stands
    broken: bool = False  # its communication with another rank broke
    left: bool = False  # it has done its work

    @classmethod
    def read(cls, text: bytes) -> Sign:
        return cls(**json.loads(text)) if text else cls(0, 0, 0.0, "start")

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


class Watchdog:
    """Watches while its `with` block runs, which is all that a process does once the ranks have met.

    An exception that leaves the block is announced to the others and ends the process with status 1. Of several processes,
    that is: a process alone has nobody to wait for, and nothing is done.
    """

    def __init__(self, meeting: Meeting, parallel: ParallelConfig) -> None:
        self.meeting = meeting
        self.lost_after = parallel.lost_after_seconds
        self.period = min(PERIOD, self.lost_after / 5)
        self.stalled_after = 60 * parallel.timeout_minutes
        own, size = meeting.place.rank, meeting.size
        watched = range(size) if own == 0 else (0, own + 1, own + 2)
        self.watched = sorted({rank % size for rank in watched} - {own})
        self.signs = dict.fromkeys(self.watched, Sign.read(b""))
        self.seen = dict.fromkeys(self.watched, time.monotonic())  # when the sign was new
        self.mates = list(meeting.mates)
        self.step = self.number = 0
        self.moved_at = self.answered = time.monotonic()
        self.broken_at: str | None = None
        self.request: tuple[End, str] | None = None  # of the main thread: to end, and what only the speaker says first
        self.leaving = self.ending = False
        self.wake = threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]

    def moved(self, *_: object) -> None:
        """The run goes on: cheap, from the main thread, as often as one likes. Fits as a hook of a module."""
        self.moved_at = time.monotonic()

    def after_step(self, trainer: Trainer) -> None:
        """As a hook of the trainer."""
        self.step = trainer.step
        self.moved()

    at_end = after_step

    def __enter__(self) -> Watchdog:
        if self.meeting.size > 1:
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.meeting.size == 1:
            return
        if error is None:
            self.leaving = True
            self.wake.set()
            self.threads[0].join(15)
            return
        try:
            self._end_by(error)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)

    def _end_by(self, error: BaseException) -> None:
        place, said_first = self.meeting.place, ""
        if isinstance(error, UserError):
            if place.rank > 0:
                time.sleep(2 * self.period)  # what all ranks find, the first one says
            end = self._own_end(f"[rank {place.rank}] {error}" if place.rank else str(error))
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            end = self._own_end("interrupted", INTERRUPTED)
        else:
            if broke(error):  # most likely a rank has gone: let it be found
                self.broken_at = _where(trace=error.__traceback__)
                time.sleep(min(self.lost_after, SUSPICIOUS_AFTER) + 5 * self.period)
            said_first = "".join(traceback.format_exception(error))
            where = _where(trace=error.__traceback__)
            end = self._own_end(
                f"{place} failed after step {self.step} in {where}: {traceback.format_exception_only(error)[-1]}"
            )
        self.request = (end, said_first)
        self.wake.set()
        time.sleep(self.lost_after + 5)
        _finish(f"{said_first}error: {end.text.rstrip()}", end.status)  # the store does not answer

    def _own_end(self, text: str, status: int = 1, lost: int | None = None) -> End:
        return End(self.meeting.place.rank, self.meeting.place.machine, text.rstrip(), status, lost)

    def _beat(self) -> None:
        try:
            store = self.meeting.connect()
            while not self.leaving:
                self._tick(store)
                self.wake.wait(self.period)
                self.wake.clear()
            self._leave(store)
        except (dist.DistError, RuntimeError) as error:
            if not self.leaving:
                self._store_lost(f"broke ({str(error).splitlines()[0]})")

    def _tick(self, store: dist.Store) -> None:
        now = time.monotonic()
        if now - self.answered > self.period + self.lost_after / 4:
            self.seen = dict.fromkeys(self.watched, now)  # this process stood still, and maybe all did: start anew
        self.answered = now
        self._post(store)
        end, *signs = store.multi_get(["end", *(f"beat/{rank}" for rank in self.watched)])
        self.answered = now = time.monotonic()
        if end:
            self._follow(store, End(**json.loads(end)))
        for rank, sign in zip(self.watched, map(Sign.read, signs), strict=True):
            if sign.number != self.signs[rank].number:
                self.signs[rank], self.seen[rank] = sign, now
        if self.request is not None:
            self._declare(store, *self.request)
        fault = self._gone(store) or self._silent(store, now) or self._stalled(store, now)
        if fault is not None:
            self._declare(store, fault)

    def _post(self, store: dist.Store, left: bool = False) -> None:
        self.number += 1
        where, idle = self.broken_at or _where(), time.monotonic() - self.moved_at
        sign = Sign(self.number, self.step, idle, where, self.broken_at is not None, left)
        store.set(f"beat/{self.meeting.place.rank}", json.dumps(asdict(sign)))

    def _gone(self, store: dist.Store) -> End | None:
        """A process of this machine that has ended without having left."""
        for mate in [mate for mate in self.mates if mate.process() is None]:
            sign = Sign.read(store.get(f"beat/{mate.rank}"))
            self.mates.remove(mate)
            if not sign.left:
                return self._own_end(f"{mate} is gone (killed, or crashed); it stood {sign}", lost=mate.rank)
        return None

    def _silent(self, store: dist.Store, now: float) -> End | None:
        suspicious = self.broken_at is not None or any(sign.broken for sign in self.signs.values())
        limit = min(self.lost_after, SUSPICIOUS_AFTER) if suspicious else self.lost_after
        for rank, sign in self.signs.items():
            if not sign.left and now - self.seen[rank] > limit:
                place = Place(**json.loads(store.get(f"rank/{rank}"))[0])
                seconds = now - self.seen[rank]
                return self._own_end(f"{place} has not been heard of for {seconds:.0f} s; it stood {sign}", lost=rank)
        return None

    def _stalled(self, store: dist.Store, now: float) -> End | None:
        """Rank 0 looks: has anything moved anywhere?"""
        if self.meeting.place.rank > 0:
            return None
        idle = [now - self.moved_at, *(sign.idle + now - self.seen[rank] for rank, sign in self.signs.items())]
        if min(idle) < self.stalled_after:
            return None
        return self._own_end(f"nothing has moved for {min(idle):.0f} s (parallel.timeout_minutes)")

    def _declare(self, store: dist.Store, end: End, said_first: str = "") -> None:
        """End the run, speaking for all if no other rank does."""
        own = json.dumps(asdict(end))
        stands = {} if end.status != 1 else self._standings(store, end)
        winner = store.compare_set("end", "", own).decode()
        if winner != own:
            self._follow(store, End(**json.loads(winner)))
        self.ending = True
        _write("" if end.status == INTERRUPTED else f"{said_first}error: {end.text}\n{standing_text(stands)}")
        self._part(store, end)
        _finish("", end.status)

    def _standings(self, store: dist.Store, end: End) -> dict[str, list[int]]:
        """Ranks by where they stand, but for the one that is lost and, if it speaks of itself, the speaker."""
        ours = end.lost is not None or "moved" in end.text
        ranks = [rank for rank in range(self.meeting.size) if rank != end.lost and ours]
        stands: dict[str, list[int]] = {}
        for rank, text in zip(ranks, store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            stands.setdefault(str(Sign.read(text)), []).append(rank)
        return stands

    def _follow(self, store: dist.Store, end: End) -> None:
        """End because another rank said so; on another machine than the speaker's, the first rank says why."""
        self.ending = True
        place = self.meeting.place
        if (
            end.machine != place.machine
            and end.status == 1
            and place.rank < min((m.rank for m in self.mates), default=place.rank + 1)
        ):
            _write(f"stopped: {end.text.splitlines()[0]}\n")
        self._part(store, end)
        time.sleep(0.5)  # a launcher ends all with the first; the speaker may still speak
        _finish("", end.status)

    def _part(self, store: dist.Store, end: End) -> None:
        """Leave nothing behind on this machine; rank 0, whose process may be the store, waits until all know."""
        self._kill(end.lost)
        with suppress(dist.DistError, RuntimeError):
            knowing = store.add("knowing", 1)
            until = time.monotonic() + 3
            while self.meeting.hosts_store and self.meeting.place.rank == 0 and time.monotonic() < until:
                if knowing >= self.meeting.size - (end.lost is not None):
                    break
                time.sleep(0.05)
                knowing = store.add("knowing", 0)

    def _kill(self, lost: int | None) -> None:
        """A process that is stopped would stay for ever: it hears no launcher."""
        for mate in self.meeting.mates:
            process = mate.process()
            with suppress(psutil.Error):
                if process is not None and (mate.rank == lost or process.status() == psutil.STATUS_STOPPED):
                    process.kill()

    def _leave(self, store: dist.Store) -> None:
        """The work is done: say so, and let rank 0's store last until all have."""
        self._post(store, left=True)
        left = store.add("left", 1)
        until = time.monotonic() + 10
        while (
            self.meeting.hosts_store and self.meeting.place.rank == 0 and left < self.meeting.size and time.monotonic() < until
        ):
            time.sleep(0.02)
            left = store.add("left", 0)

    def _guard(self) -> None:
        """Notice that the store is silent, which holds up the other thread."""
        looked = time.monotonic()
        while not self.leaving and not self.ending:
            time.sleep(self.period)
            now = time.monotonic()
            if now - looked > self.period + self.lost_after / 4:
                self.answered = now  # this process stood still
            looked = now
            if now - self.answered > self.lost_after and not self.leaving and not self.ending:
                self._store_lost(f"has not answered for {now - self.answered:.0f} s")

    def _store_lost(self, how: str) -> None:
        """The store is rank 0's or the launcher's, and without it nobody can claim to speak: the first that lives here does."""
        self.ending = True
        meeting = self.meeting
        first, sign = meeting.first, self.signs.get(0, Sign.read(b""))
        alive = [m.rank for m in meeting.mates if (p := m.process()) is not None and p.status() != psutil.STATUS_STOPPED]
        if meeting.place.rank < min(alive, default=meeting.size):
            if meeting.hosts_store:
                here = any(mate.rank == 0 for mate in meeting.mates)
                fate = "is gone (killed, or crashed)" if here and first.process() is None else "does not answer"
                text = f"{first} {fate}: its store at {meeting.address} {how}; it stood {sign}"
            else:
                text = f"the launcher's store at {meeting.address} {how}: its machine or the way there is down"
            own = Sign(0, self.step, 0.0, self.broken_at or _where())
            stands = {str(own): [meeting.place.rank]}
            for rank in [rank for rank in self.watched if rank > 0 or not meeting.hosts_store]:
                stands.setdefault(str(self.signs[rank]), []).append(rank)
            _write(f"error: {text}\n{standing_text(stands)}")
        self._kill(0 if meeting.hosts_store else None)
        time.sleep(3 * self.period)  # the others on this machine notice within a second, and the first one speaks
        _finish("", 1)


def broke(error: BaseException) -> bool:
    """Whether it tells of communication with another rank."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(mark in str(error) for mark in BROKEN))


def standing_text(stands: dict[str, list[int]]) -> str:
    """A line for each place where ranks stand."""
    lines = []
    for where, ranks in stands.items():
        lines.append(f"  {ranks_text(ranks)} {'stands' if len(ranks) == 1 else 'stand'} {where}\n")
    rest = f"  and {len(lines) - SHOWN_LINES} other places\n" if len(lines) > SHOWN_LINES else ""
    return "".join(lines[:SHOWN_LINES]) + rest


def _where(trace: TracebackType | None = None) -> str:
    """The innermost line of this project at which the main thread is, or that `trace` passed."""
    frame: FrameType | None = None
    if trace is None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if name := _ours(frame):
                return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return "code that is not ours"
    found = "code that is not ours"
    while trace is not None:
        if name := _ours(trace.tb_frame):
            found = f"{name}:{trace.tb_lineno} {trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found


def _ours(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES and path != Path(__file__):
        return str(path.relative_to(ROOT))
    return None


def _write(text: str) -> None:
    """Past Python's own streams, whose locks the main thread may hold."""
    with suppress(OSError):
        while text:
            text = text.encode()[os.write(2, text.encode()) :].decode(errors="ignore")


def _finish(text: str, status: int) -> None:
    """End this process at once: at a usual end the threads of process groups may abort it or wait for others."""
    if text:
        _write(text + "\n")
    flusher = threading.Thread(target=sys.stdout.flush, daemon=True)
    flusher.start()
    flusher.join(0.5)
    os._exit(status)
