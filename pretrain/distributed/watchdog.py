"""Ends a run of several processes when one is lost or nothing moves; one process reports which rank, and where all ranks were.

A thread of each process posts a sign of life to the store of the rendezvous every second and reads those of the next two ranks
and of rank 0. Whether anything moves goes up a tree: the first rank of each machine reads the signs of that machine, and rank 0
those of the first ranks, so that no rank reads one of every rank. The first to find a fault claims the right to report it under
the key `end`; the others read it there and end, too. A second thread notices when the store itself does not answer.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType

import torch.distributed as dist

from configs.errors import UserError
from configs.schema import ParallelConfig
from pretrain.distributed.collectives import OtherRankError
from pretrain.distributed.pace import STANDARD, Pace
from pretrain.distributed.rendezvous import Place, Rendezvous
from pretrain.distributed.signs import End, Sign, broke, end_process, standings, where_main_thread_is, where_raised, write

INTERRUPTED = 130
UNKNOWN = Sign.read(b"")


class Watchdog:
    """Watches while its `with` block runs: everything that a process does after the rendezvous.

    An exception that leaves the block is announced to the other ranks and ends the process. A single process is not watched.
    """

    def __init__(self, rendezvous: Rendezvous, parallel: ParallelConfig, pace: Pace = STANDARD) -> None:
        self.rendezvous, self.pace = rendezvous, pace
        self.lost_after = parallel.lost_after_seconds
        self.stalled_after = 60 * parallel.timeout_minutes
        self.period = min(pace.beat, self.lost_after / 5)
        own, size = rendezvous.place.rank, rendezvous.size
        mates = [mate.rank for mate in rendezvous.mates]
        self.below = [] if mates and min(mates) < own else mates  # whose progress this rank passes on with its own
        others = {0, (own + 1) % size, (own + 2) % size, *self.below, *rendezvous.leaders}
        self.watched = sorted(others - {own})
        self.signs = dict.fromkeys(self.watched, UNKNOWN)
        self.seen = dict.fromkeys(self.watched, time.monotonic())  # when the sign was new
        self.mates = list(rendezvous.mates)
        self.step = self.number = 0
        self.moved_at = self.answered_at = time.monotonic()
        self.broken_in: str | None = None  # where communication broke
        self.request: tuple[End, str] | None = None  # of the main thread: to end, and what goes before if this rank speaks
        self.leaving = self.ending = False
        self.wake = threading.Event()
        self.last_words = threading.Lock()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]

    def moved(self, *_: object) -> None:
        """Note progress; cheap. The main thread calls it as often as it likes, also as a hook of a module."""
        self.moved_at = time.monotonic()

    def reached(self, step: int) -> None:
        """Note that optimizer step `step`, counted from 1, is done."""
        self.step = step
        self.moved()

    def __enter__(self) -> Watchdog:
        if self.rendezvous.size > 1:
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.rendezvous.size == 1:
            return
        if error is None:
            self.leaving = True
            self.wake.set()
            self.threads[0].join(15)
            return
        try:
            self.request = self._request(error)
            self.wake.set()
            time.sleep(self.lost_after + 5)  # the thread ends the process
            write(f"{self.request[1]}error: {self.request[0].text}\n")
        finally:  # a second Ctrl-C
            end_process(self.request[0].status if self.request else INTERRUPTED)

    def _request(self, error: BaseException) -> tuple[End, str]:
        place = self.rendezvous.place
        if isinstance(error, UserError):
            if place.rank > 0 or _of_another_rank(error):
                time.sleep(2 * self.period)  # what all ranks find, the first one says, and a fault of one rank that rank
            return self._end(f"[rank {place.rank}] {error}" if place.rank else str(error)), ""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return self._end("interrupted", status=INTERRUPTED), ""
        where = where_raised(error.__traceback__)
        if broke(error):  # most likely a rank has gone: let it be found
            self.broken_in = where
            time.sleep(min(self.lost_after, self.pace.suspicious_after) + 5 * self.period)
        what, trace = traceback.format_exception_only(error)[-1].splitlines()[0], "".join(traceback.format_exception(error))
        return self._end(f"{place} failed after step {self.step} in {where}: {what}"), trace

    def _end(self, text: str, status: int = 1, lost: int | None = None, report: bool = False) -> End:
        return End(self.rendezvous.place.rank, self.rendezvous.place.machine, text, status, lost, report)

    def _beat(self) -> None:
        try:
            store = self.rendezvous.connect()
            while not self.leaving:
                self._tick(store)
                self.wake.wait(self.period)
                self.wake.clear()
            self._leave(store)
        except RuntimeError as error:  # of the store
            if not self.leaving:
                self._end_without_store(f"broke ({str(error).splitlines()[0]})")

    def _tick(self, store: dist.Store) -> None:
        """One sign of life, and a look at those of others."""
        now = time.monotonic()
        if now - self.answered_at > self.period + self.lost_after / 4:
            self.seen = dict.fromkeys(self.watched, now)  # this process was suspended, and all may have been: count anew
        self._post(store)
        end, *signs = store.multi_get(["end", *(f"beat/{rank}" for rank in self.watched)])
        self.answered_at = now = time.monotonic()
        if end:
            self._follow(store, End(**json.loads(end)))
        for rank, sign in zip(self.watched, map(Sign.read, signs), strict=True):
            if sign.number != self.signs[rank].number:
                self.signs[rank], self.seen[rank] = sign, now
        if self.request is not None:
            self._declare(store, *self.request)
        fault = self._gone(store) or self._silent(store, now) or self._stalled(now)
        if fault is not None:
            self._declare(store, fault)

    def _post(self, store: dist.Store, left: bool = False) -> None:
        self.number += 1
        store.set(f"beat/{self.rendezvous.place.rank}", json.dumps(asdict(self._own_sign(left))))

    def _own_sign(self, left: bool = False) -> Sign:
        now, broken = time.monotonic(), self.broken_in is not None
        below = (self.signs[rank].idle + now - self.seen[rank] for rank in self.below)
        idle = min(now - self.moved_at, *below) if self.below else now - self.moved_at
        return Sign(self.number, self.step, idle, self.broken_in or where_main_thread_is(), broken, left)

    def _gone(self, store: dist.Store) -> End | None:
        """A process of this machine that has ended without having left."""
        for mate in [mate for mate in self.mates if mate.state() is None]:
            sign = Sign.read(store.get(f"beat/{mate.rank}"))
            self.mates.remove(mate)
            if not sign.left:
                return self._end(f"{mate} is gone (killed, or crashed); it was {sign}", lost=mate.rank, report=True)
        return None

    def _silent(self, store: dist.Store, now: float) -> End | None:
        """A rank, on any machine, that gives no sign of life."""
        suspicious = self.broken_in is not None or any(sign.broken for sign in self.signs.values())
        limit = min(self.lost_after, self.pace.suspicious_after) if suspicious else self.lost_after
        for rank, sign in self.signs.items():
            seconds = now - self.seen[rank]
            if not sign.left and seconds > limit:
                place = Place(**json.loads(store.get(f"rank/{rank}"))[0])
                text = f"{place} has not been heard of for {seconds:.0f} s; it was {sign}"
                return self._end(text, lost=rank, report=True)
        return None

    def _stalled(self, now: float) -> End | None:
        """Nothing has moved on any rank; rank 0 hears of all."""
        if self.rendezvous.place.rank > 0:
            return None
        idle = min(now - self.moved_at, *(sign.idle + now - self.seen[rank] for rank, sign in self.signs.items()))
        if idle < self.stalled_after:
            return None
        return self._end(f"nothing has moved for {idle:.0f} s (parallel.timeout_minutes)", report=True)

    def _declare(self, store: dist.Store, end: End, before: str = "") -> None:
        """End the run, and speak for all unless another rank does."""
        report = ""
        if end.report:
            ranks = [rank for rank in range(self.rendezvous.size) if rank != end.lost]
            signs = map(Sign.read, store.multi_get([f"beat/{rank}" for rank in ranks]))
            report = standings(dict(zip(ranks, signs, strict=True)))
        own = json.dumps(asdict(end))
        winner = store.compare_set("end", "", own).decode()
        if winner != own:
            self._follow(store, End(**json.loads(winner)))
        self.ending = True
        if end.status == 1:
            write(f"{before}error: {end.text}\n{report}")
        self._part(store, end)
        end_process(end.status)

    def _follow(self, store: dist.Store, end: End) -> None:
        """End because another rank said so; the first rank on each machine but the speaker's says why."""
        self.ending = True
        place = self.rendezvous.place
        first_here = place.rank < min((mate.rank for mate in self.mates), default=self.rendezvous.size)
        if end.machine != place.machine and end.status == 1 and first_here:
            write(f"stopped: {end.text.splitlines()[0]}\n")
        self._part(store, end)
        time.sleep(self.pace.follow)  # a launcher ends all ranks with the first one, and the speaker may still be writing
        end_process(end.status)

    def _part(self, store: dist.Store, end: End) -> None:
        """Leave nothing behind on this machine; rank 0, if it serves the store, waits until all know."""
        self._kill(end.lost)
        with suppress(RuntimeError):
            self._count_out(store, "knowing", self.rendezvous.size - (end.lost is not None), self.pace.count_out)

    def _leave(self, store: dist.Store) -> None:
        """The work is done: say so, and let rank 0's store last until all have."""
        self._post(store, left=True)
        self._count_out(store, "left", self.rendezvous.size, self.pace.leave)

    def _count_out(self, store: dist.Store, key: str, size: int, seconds: float) -> None:
        counted, until = store.add(key, 1), time.monotonic() + seconds
        while self.rendezvous.serves_store and self.rendezvous.place.rank == 0 and counted < size and time.monotonic() < until:
            time.sleep(0.02)
            counted = store.add(key, 0)

    def _kill(self, lost: int | None) -> None:
        """Kill stopped processes of this machine: they ignore the launcher and would stay for ever."""
        for mate in self.rendezvous.mates:
            state = mate.state()
            if state == "T" or (state is not None and mate.rank == lost):
                with suppress(ProcessLookupError):
                    os.kill(mate.pid, signal.SIGKILL)

    def _guard(self) -> None:
        """Notice that the store is silent; the other thread then blocks on it."""
        looked = time.monotonic()
        while not self.leaving and not self.ending:
            time.sleep(self.period)
            now = time.monotonic()
            if now - looked > self.period + self.lost_after / 4:
                self.answered_at = now  # this process was suspended
            looked = now
            if now - self.answered_at > self.lost_after and not self.leaving and not self.ending:
                self._end_without_store(f"has not answered for {now - self.answered_at:.0f} s")

    def _end_without_store(self, how: str) -> None:
        """The store is rank 0's or the launcher's. Without it none can claim to speak: the first that lives here does."""
        with self.last_words:  # never released
            if not self.ending:
                self.ending = True
                rendezvous = self.rendezvous
                alive = [mate.rank for mate in rendezvous.mates if mate.state() not in (None, "T")]
                if rendezvous.place.rank < min(alive, default=rendezvous.size):
                    write(self._words_without_store(how))
                time.sleep(3 * self.period)  # the others here notice within a second, and one of them may be the first
                self._kill(0 if rendezvous.serves_store else None)
            end_process(1)

    def _words_without_store(self, how: str) -> str:
        rendezvous = self.rendezvous
        known = {rank: sign for rank, sign in self.signs.items() if rank > 0 or not rendezvous.serves_store}
        report = standings({rendezvous.place.rank: self._own_sign(), **known})
        if not rendezvous.serves_store:
            return f"error: the launcher's store at {rendezvous.address} {how}: its machine or the way there is down\n{report}"
        here = any(mate.rank == 0 for mate in rendezvous.mates)
        fate = "is gone (killed, or crashed)" if here and rendezvous.first.state() is None else "does not answer"
        sign = self.signs.get(0, UNKNOWN)
        return f"error: {rendezvous.first} {fate}: its store at {rendezvous.address} {how}; it was {sign}\n{report}"


def _of_another_rank(error: BaseException | None) -> bool:
    """Whether it says that another rank failed, perhaps in other words: its context has those of OtherRankError."""
    while error is not None and not isinstance(error, OtherRankError):
        error = error.__context__
    return error is not None
