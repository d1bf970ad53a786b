"""Run the children of a study, several at once, until all have ended or a signal asks to stop. Torch-free."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from configs.durable import write_text
from configs.errors import UserError
from pretrain.loop.lock import check_free
from pretrain.studies import machine
from pretrain.studies.children import Child, counted_children
from pretrain.studies.records import Outcome, check_definition, now, read_outcome
from pretrain.studies.running import Running, clear
from pretrain.studies.screen import Screen

POLL = 0.2  # seconds between looks at the children
NOTED = 30.0  # seconds between notes of the time spent
PATIENCE = 300.0  # seconds for a run that still holds its folder, such as one that saves because its sweep was killed
TIME = "sweep.json"  # in the study's folder: how long its sweeps have run


@dataclass
class Sweep:
    """The state of a sweep. `outcomes` are those of children that have ended, now or before."""

    children: Sequence[Child]
    shares: list[machine.Share]
    screen: Screen
    hours: float | None = None
    srun: bool = False  # start children as steps of a Slurm job
    notes_time: bool = True
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    waiting: deque[Child] = field(default_factory=deque)
    stopped_by: int | None = None
    stopped_at: float = 0.0
    kills: bool = False
    spent: float = 0.0  # seconds of earlier sweeps
    flops_done: float = 0.0  # by children that have ended in this sweep
    began: float = field(default_factory=time.monotonic)

    def run(self, leave_failed: bool = False) -> int | None:
        """Run all that are left. Returns the signal that ended the sweep; children that failed are in `outcomes`."""
        self.prepare(leave_failed)
        with self.signals():
            try:
                while self.running or (self.waiting and self.may_start):
                    self.start_some()
                    self.look()
                    self.screen.show(self)
                    time.sleep(POLL)
            finally:
                for running in self.running:  # only after an error of ours
                    running.stop()
                self.note_time()
        self.screen.end(self)
        return self.stopped_by

    def prepare(self, leave_failed: bool) -> None:
        """Find what is left. UserError if a child's folder holds another one."""
        self.spent = read_time(self.folder)
        for child in self.children:
            check_definition(child.folder, child.definition)
            outcome = read_outcome(child.folder)
            if outcome is not None and (outcome.status == "finished" or (leave_failed and outcome.status == "failed")):
                self.outcomes[child.name] = outcome
                if outcome.status == "finished":
                    clear(child)  # of a sweep that was killed before it did
            else:
                self.waiting.append(child)

    @property
    def folder(self) -> Path:
        return self.children[0].study.folder

    @property
    def elapsed(self) -> float:
        """Seconds of this sweep."""
        return time.monotonic() - self.began

    @property
    def out_of_time(self) -> bool:
        return self.hours is not None and self.spent + self.elapsed >= 3600 * self.hours

    @property
    def may_start(self) -> bool:
        return self.stopped_by is None and not self.out_of_time

    def start_some(self) -> None:
        """Start children on all free shares of the machine."""
        free = list(self.shares)
        for running in self.running:
            free.remove(running.share)
        tries = len(self.waiting)
        while free and tries and self.waiting and self.may_start:
            tries -= 1
            child = self.waiting.popleft()
            if not self.is_free(child):
                self.waiting.append(child)
                continue
            self.start(child, free.pop(0))

    def start(self, child: Child, share: machine.Share) -> None:
        """Start a child; if its folder cannot be used, it has failed."""
        try:
            self.running.append(Running.start(child, share, machine.launcher(child.study.processes, self.srun)))
        except UserError as error:
            outcome = self.outcomes[child.name] = Outcome("failed", str(error), 0.0, now(), now(), 0)
            self.screen.ended(child, outcome)
        else:
            self.screen.started(child)

    def is_free(self, child: Child) -> bool:
        """Whether no run holds the child's folder. UserError if one does for too long."""
        try:
            check_free(child.folder)
        except UserError:
            if self.elapsed > PATIENCE and not self.running:
                raise
            return False
        return True

    def look(self) -> None:
        """Record the children that have ended."""
        for running in list(self.running):
            if self.kills:
                running.kill()
            elif self.stopped_by is not None and not running.told:
                running.stop()
            status = running.process.poll()
            if status is not None:
                self.flops_done += running.flops_done
                outcome = running.end(status)
                self.running.remove(running)
                self.outcomes[running.child.name] = outcome
                self.screen.ended(running.child, outcome)
        self.note_time(every=NOTED)

    _noted = 0.0

    def note_time(self, every: float = 0.0) -> None:
        """Write down how long sweeps of this study have run, for a budget in hours."""
        if self.notes_time and self.elapsed - self._noted >= every:
            self._noted = self.elapsed
            with suppress(OSError):  # a full disk must not end what runs
                write_text(self.folder / TIME, json.dumps({"seconds": round(self.spent + self.elapsed, 1)}) + "\n")

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the children to save and end; a second one kills them."""
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is None:
            self.stopped_by, self.stopped_at = number, time.monotonic()
        elif time.monotonic() - self.stopped_at > 1:  # one key press can arrive twice
            self.kills = True

    def failed(self) -> list[str]:
        return [child.name for child in self.children if self.is_status(child, "failed")]

    def is_status(self, child: Child, status: str) -> bool:
        outcome = self.outcomes.get(child.name)
        return outcome is not None and outcome.status == status

    def count(self, status: str) -> int:
        return sum(self.is_status(child, status) for child in self.children)


def read_time(folder: Path) -> float:
    """Seconds that sweeps of a study have run."""
    try:
        return float(json.loads((folder / TIME).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def failures(sweep: Sweep) -> UserError | None:
    """What to tell about the children that failed."""
    failed = sweep.failed()
    if not failed:
        return None
    lines = [f"  {name}: {sweep.outcomes[name].error}" for name in failed]
    advice = "the log is output.log in the child's folder; start the sweep again to resume them"
    return UserError(f"{counted_children(len(failed))} failed; {advice}\n" + "\n".join(lines))
