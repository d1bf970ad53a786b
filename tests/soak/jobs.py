"""Jobs of two ranks that can be killed: forked, or started by a launcher as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from tests.helpers import ROOT, command, environment, forked
from tests.ranks import Ranks

RANKS = 2
SCRIPT = "tests/soak/observed.py"
MARK = "SOAK_JOB"  # in the environment of every process of a launched job


class Job(Protocol):
    def living(self) -> dict[str, int]:
        """Process numbers of what still runs, by name: rank 0, rank 1, launcher."""

    def status(self) -> int | None:
        """Exit status, None while any process runs."""

    def output(self) -> str:
        """All that it has written."""

    def close(self) -> None:
        """Kill what is left."""


class Forked:
    """Ranks alone: who ends ends by itself."""

    def __init__(self, arguments: Sequence[str], order: Path) -> None:
        self.ranks: Ranks = forked([SCRIPT, *arguments], RANKS, variables={"SOAK_ORDER": str(order)})
        self.ranks.__enter__()

    def living(self) -> dict[str, int]:
        return {f"rank {r}": self.ranks.pid(r) for r, status in enumerate(self.ranks.statuses()) if status is None}

    def status(self) -> int | None:
        statuses = self.ranks.statuses()
        return None if None in statuses else next((status for status in statuses if status), 0)

    def output(self) -> str:
        return self.ranks.report()

    def close(self) -> None:
        self.ranks.__exit__(None, None, None)


class Launched:
    """Ranks under `deepspeed` or `torchrun`, their output in a file."""

    def __init__(self, arguments: Sequence[str], order: Path, launcher: str) -> None:
        self.mark, self.file = uuid.uuid4().hex, order.with_suffix(".output")
        with self.file.open("w") as output:
            self.process = subprocess.Popen(
                command([SCRIPT, *arguments], launcher, RANKS),
                cwd=ROOT,
                env={**environment(), "SOAK_ORDER": str(order), MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def living(self) -> dict[str, int]:
        found: dict[str, int] = {}
        self.process.poll()
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                variables = process.environ()
                if variables.get(MARK) != self.mark or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                rank = variables.get("RANK")
                number = sum(name.startswith("launcher") for name in found)
                found[f"rank {rank}" if rank else f"launcher {number}"] = process.pid
        return found

    def status(self) -> int | None:
        return None if self.living() else self.process.wait()

    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def close(self) -> None:
        while numbers := self.living().values():
            for number in numbers:
                _kill(number)
            time.sleep(0.05)
        self.process.wait()


def launch(arguments: Sequence[str], order: Path, launcher: str) -> Job:
    """`launcher`: forked, deepspeed or torchrun."""
    return Forked(arguments, order) if launcher == "forked" else Launched(arguments, order, launcher)


def kill(job: Job, victim: str, share: float) -> str:
    """SIGKILL to a rank, to one of a launcher's processes, or to all, if there is no such one; who was killed."""
    living = job.living()
    chosen = sorted(name for name in living if name.startswith(victim))
    if victim != "job" and chosen:
        name = chosen[int(share * len(chosen))]
        _kill(living[name])
        return name
    while living:
        for number in living.values():
            _kill(number)
        living = {name: number for name, number in job.living().items() if number not in living.values()}
    return "job"


def _kill(number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
