"""One child while it runs: how it starts, and what its end means. Torch-free."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from configs.errors import UserError, shortened
from pretrain.checkpoints.folder import CHECKPOINTS, all_steps, step_folder
from pretrain.studies import machine
from pretrain.studies.children import Child
from pretrain.studies.progress import PRUNED, standing
from pretrain.studies.records import (
    ATTEMPT,
    LOG,
    Outcome,
    Status,
    attempts,
    check_definition,
    now,
    read_outcome,
    write_definition,
    write_outcome,
)

LONGEST_ERROR = 300
STOPPED = (0, 130)  # exit statuses of pretrain.py after a signal
TAIL = 2**14  # bytes of the log in which an error is looked for


@dataclass
class Running:
    """A child that has been started."""

    child: Child
    share: machine.Share
    process: subprocess.Popen[bytes]
    attempt: int
    log_start: int  # bytes of earlier attempts
    started: str
    first_step: int  # that the child had reached before
    clock: float = field(default_factory=time.monotonic)
    told: bool = False  # it was asked to end

    @classmethod
    def start(cls, child: Child, share: machine.Share, launcher: Sequence[str]) -> Running:
        """UserError if the child's folder cannot be used."""
        command = [*launcher, *child.arguments]
        folder = child.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_definition(folder, child.definition)
            write_definition(folder, child.definition)
            attempt = attempts(folder) + 1
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write(f"{ATTEMPT}{attempt}, {now()}: {shlex.join(command)}\n")
                log.flush()
                begins = os.fstat(log.fileno()).st_size
                process = machine.start(command, share.environment(), log)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
        return cls(child, share, process, attempt, begins, now(), standing(folder).step)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.clock

    @property
    def flops_done(self) -> float:
        """Since this sweep started the child."""
        return max(0, standing(self.child.folder).step - self.first_step) / self.child.steps * self.child.flops

    def stop(self) -> None:
        """Ask the child to save and end."""
        self.told = True
        with suppress(OSError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.told = True
        machine.kill(self.process)

    def end(self, status: int) -> Outcome:
        """Record how the child ended, of which its exit status is known."""
        found, error = self._verdict(status)
        before = read_outcome(self.child.folder)
        seconds = self.seconds + (before.seconds if before else 0.0)
        started = before.started if before else self.started
        outcome = Outcome(found, error, round(seconds, 3), started, now(), self.attempt)
        try:
            write_outcome(self.child.folder, outcome)
        except OSError as trouble:  # a full disk: the child is tried again at the next start
            return replace(outcome, status="failed", error=f"{self.child.folder}: cannot be written ({trouble.strerror})")
        if found == "finished":
            clear(self.child)
        return outcome

    def _verdict(self, status: int) -> tuple[Status, str | None]:
        if status == 0 and self._complete():
            return "finished", None
        if status in STOPPED or self.told:
            return "stopped", None
        return "failed", self._error(status)

    def _complete(self) -> bool:
        """Whether training has come to its end: a child that was asked to stop exits with 0, too."""
        if self.child.config.gha.stage == "vote":  # trains nothing
            return not self.told
        return standing(self.child.folder).step >= self.child.steps

    def _error(self, status: int) -> str:
        """The error in one line: that of the log, or how the process ended."""
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        with (self.child.folder / LOG).open("rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - TAIL))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("error: ")]
        text = own[0].removeprefix("error: ") if own else (lines[-1] if lines else "")
        return shortened(text, LONGEST_ERROR) or f"exit status {status}"


def clear(child: Child) -> None:
    """Delete the checkpoints of a finished child that the study does not keep."""
    for run in (child.folder, child.folder / PRUNED):
        folder = run / CHECKPOINTS
        if child.study.checkpoints == "none":
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            for step in all_steps(folder)[:-1]:
                shutil.rmtree(step_folder(folder, step), ignore_errors=True)
