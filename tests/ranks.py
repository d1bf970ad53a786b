"""Processes for tests that start in milliseconds: forked from one that has imported everything.

A new interpreter needs five seconds of a core to import torch, deepspeed and megatron-core. So each pytest process starts one
fork server (Python's own, `multiprocessing.forkserver`), which imports tests/preload.py once and then forks a process for each
rank. The server has one thread, no process group and no GPU, so its forks are like new processes that have imported the same.

A forked process

- has the environment that its caller names, not the server's; what a library reads at its import is the server's
- leads a session of its own, so that what it starts ends with it
- writes its output to files, which `Ranks.output` and `Ranks.errors` read
- leaves by `os._exit` once its streams are flushed: while an interpreter takes itself down, threads of process groups now and
  then abort the process
- writes where its threads stand when it hangs
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

# For the imports of the server: one thread, and no GPU, which forked processes cannot use once a library has looked for it.
IMPORTING = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    "HF_HUB_OFFLINE": "1",
    "TRITON_INTERPRET": "1",  # which Triton reads at its import; our kernels ask a process's own environment
}
DUMP = signal.SIGUSR1


class RankError(Exception):
    """What went wrong in a process of `Ranks`: its traceback, or how it ended."""


class Ranks:
    """Forked processes that all call `work(*arguments)`, one for each environment. They are dead when the `with` block ends."""

    def __init__(
        self, work: Callable[..., object], environments: Sequence[Mapping[str, str]], arguments: Sequence[tuple[Any, ...]]
    ) -> None:
        self._work, self._environments, self._arguments = work, environments, arguments
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[Any] = []

    def __enter__(self) -> Ranks:
        context = multiprocessing.get_context("forkserver")
        _start_server()
        for rank, (environment, arguments) in enumerate(zip(self._environments, self._arguments, strict=True)):
            job = pickle.dumps((self._work, arguments))
            files = [str(self._file(rank, name)) for name in ("output", "errors")]
            process = context.Process(target=_run, args=(job, dict(environment), *files))
            process.start()
            self._processes.append(process)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self._folder.cleanup()

    def statuses(self) -> list[int | None]:
        """Exit status of each process as `subprocess` has it, None while it runs."""
        return [process.exitcode for process in self._processes]

    def wait(self, seconds: float) -> int | None:
        """Until all have ended well, or one has not: its rank. TimeoutError, with what has been written, after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            statuses = self.statuses()
            failed = [rank for rank, status in enumerate(statuses) if status]
            if failed:
                return failed[0]
            if None not in statuses:
                return None
            self._wait_for_one(deadline, seconds)

    def join(self, seconds: float) -> list[int | None]:
        """Until all have ended by themselves, well or not: `statuses`. TimeoutError as in `wait`."""
        deadline = time.monotonic() + seconds
        while None in self.statuses():
            self._wait_for_one(deadline, seconds)
        return self.statuses()

    def output(self, rank: int) -> str:
        """What a process has written to standard output."""
        return self._text(rank, "output")

    def errors(self, rank: int) -> str:
        """What a process has written to standard error; its traceback comes last."""
        return self._text(rank, "errors")

    def report(self) -> str:
        """All output of all processes, for people."""
        statuses = self.statuses()
        parts = [
            (f"rank {rank}, {_fate(statuses[rank])}", self.output(rank), self.errors(rank)) for rank in range(len(statuses))
        ]
        return "\n".join(f"{title}\n{output}{errors}" for title, output, errors in parts)

    def pid(self, rank: int) -> int:
        pid: int = self._processes[rank].pid
        return pid

    def send_signal(self, rank: int, number: signal.Signals) -> None:
        """A signal to one process, as from a terminal or a batch system."""
        os.kill(self.pid(rank), number)

    def terminate(self, seconds: float) -> None:
        """Ask those that still run to end, as a launcher does, and wait."""
        for process in self._processes:
            if process.exitcode is None:
                process.terminate()
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill all with everything that they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.exitcode is None:
                process.kill()  # before it leads its session
                process.join()

    def _file(self, rank: int, name: str) -> Path:
        return Path(self._folder.name, f"{rank}.{name}")

    def _text(self, rank: int, name: str) -> str:
        file = self._file(rank, name)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def _wait_for_one(self, deadline: float, seconds: float) -> None:
        running = [process.sentinel for process in self._processes if process.exitcode is None]
        if running and not wait(running, max(0.0, deadline - time.monotonic())):
            self._dump()
            raise TimeoutError(f"ranks hang after {seconds:.0f} s\n{self.report()}")

    def _dump(self) -> None:
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, DUMP)
        time.sleep(0.5)


def run_forked(
    work: Callable[..., object], ranks: int, *arguments: Any, environment: Mapping[str, str], seconds: float
) -> None:
    """Run `work(rank, *arguments)` in so many forked processes to its end. What fails in one ends all and is raised here."""
    with Ranks(work, [environment] * ranks, [(rank, *arguments) for rank in range(ranks)]) as processes:
        failed = processes.wait(seconds)
        if failed is not None:
            time.sleep(0.1)  # others may be about to say why
            status = processes.statuses()[failed]
            raise RankError(f"rank {failed} {_fate(status)}\n{processes.errors(failed)}\n\nall output:\n{processes.report()}")
        for rank in range(ranks):
            sys.stdout.write(processes.output(rank))
            sys.stderr.write(processes.errors(rank))


def run_script(folder: str, path: str, *arguments: str) -> None:
    """In a forked process: what `python path arguments` does in a folder."""
    os.chdir(folder)
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def _start_server() -> None:
    forkserver.set_forkserver_preload(["tests.preload"])
    before = dict(os.environ)
    os.environ.update(IMPORTING, HF_HOME=_cache_of_transformers())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


@cache
def _cache_of_transformers() -> str:
    """A folder of this process's server; transformers notes at its import where it copies a model's code to."""
    folder = tempfile.mkdtemp(prefix="huggingface-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _run(job: bytes, environment: Mapping[str, str], output: str, errors: str) -> None:
    """The life of a forked process."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable()
    faulthandler.register(DUMP)
    try:
        work, arguments = pickle.loads(job)
        work(*arguments)
        status = 0
    except SystemExit as end:
        status = _status_of(end)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _fate(status: int | None) -> str:
    if status is None:
        return "still runs"
    return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
