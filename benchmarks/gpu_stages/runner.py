"""Runs each stage of benchmarks/gpu.py in processes of its own, which cannot stop the next one.

A process sends every row as soon as it is there. One that exceeds a time limit is killed with all that it has started; one that
dies, or whose GPU no longer answers after a failed launch, is replaced, and the new one continues with the next case.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.gpu_stages.stages import Case, Options, Row, SkippedError, Stage
from configs.targets import load_target

LONGEST = 300  # characters of an error in a row; the log has all


class Rows:
    """The rows so far, in a JSON file that is complete after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".json.new")
        new.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n", encoding="utf-8")
        new.replace(self.path)


class StageRun:
    """One stage, in as many processes as it takes. `context` starts them: multiprocessing's "fork" or "spawn"."""

    def __init__(self, stage: Stage, options: Options, add: Callable[[Row], None], log: Path, context: Any) -> None:
        self.stage, self.options, self.log, self.context = stage, options, log, context
        self._add = add
        self._deadline = monotonic() + stage.seconds
        self._waiting: list[str] | None = None  # names of cases to do; None until a process has said which there are
        self._current: str | None = None
        self._case_deadline = self._deadline

    def run(self) -> None:
        """Until every case has a row. Each process finishes at least one case, so this ends."""
        while self._waiting is None or self._waiting:
            before = self._waiting
            why = self._attempt()
            if self._current is not None:
                self._ended(self._current, {"error": why})
            if self._waiting is None:
                self._add({"stage": self.stage.name, "error": why})
                return
            if monotonic() >= self._deadline or self._waiting == before:
                self._give_up(why)

    def _attempt(self) -> str:
        """Start a process and follow it to its end; why it ended."""
        receive, send = self.context.Pipe(duplex=False)
        arguments = (self.stage, self.options, self._waiting, send, self.log)
        process = self.context.Process(target=work, args=arguments, name=self.stage.name)
        sys.stdout.flush()  # else a forked process writes it again
        process.start()
        send.close()
        try:
            return self._follow(receive) or _fate(process, self.log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not lead its group yet
            process.join()
            receive.close()

    def _follow(self, receive: Connection) -> str | None:
        """Take messages until the process closes the pipe, or a time limit is over: then which."""
        while True:
            limit = self._deadline if self._current is None else min(self._deadline, self._case_deadline)
            if not receive.poll(max(0.0, limit - monotonic())):
                case = limit < self._deadline
                return (
                    f"over the {'case' if case else 'stage'}'s {self.stage.case_seconds if case else self.stage.seconds:.3g} s"
                )
            try:
                kind, value = receive.recv()
            except EOFError:
                return None
            self._take(kind, value)

    def _take(self, kind: str, value: Any) -> None:
        if kind == "cases":
            self._waiting = value
        elif kind == "begin":
            self._current, self._case_deadline = value, monotonic() + self.stage.case_seconds
        elif kind == "row":
            self._add({"stage": self.stage.name, "case": self._current, **value})
        elif kind == "end" and self._current is not None:
            self._ended(self._current)

    def _ended(self, name: str, row: Row | None = None) -> None:
        if row is not None:
            self._add({"stage": self.stage.name, "case": name, **row})
        assert self._waiting is not None
        self._waiting, self._current = [other for other in self._waiting if other != name], None

    def _give_up(self, why: str) -> None:
        for name in self._waiting or ():
            self._ended(name, {"error": f"not reached: {why}"})


def _fate(process: Any, log: Path) -> str:
    """How a process ended by itself."""
    process.join(timeout=5)
    status = process.exitcode
    if status == 0:
        return "the process ended early"
    how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
    return _short(f"the process ended {how}: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def work(stage: Stage, options: Options, names: list[str] | None, send: Connection, log: Path) -> None:
    """The life of a stage's process: do the cases in `names`, or all, in their order."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 0
    try:
        cases = [case for case in load_target(stage.target)(options) if names is None or case.name in names]
        gc.collect()
        gc.freeze()  # else the collection after each case looks at all modules again
        send.send(("cases", [case.name for case in cases]))
        for case in cases:
            _do(case, send)
            tidy(options.device)  # raises where the GPU no longer answers
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at a normal exit, threads of process groups sometimes abort the process


def _do(case: Case, send: Connection) -> None:
    print(f"--- {case.name}", flush=True)
    send.send(("begin", case.name))
    try:
        for row in case.run():
            send.send(("row", row))
    except SkippedError as why:
        send.send(("row", {"skipped": str(why)}))
    except Exception as error:
        traceback.print_exc()
        send.send(("row", {"error": _short(f"{type(error).__name__}: {error}")}))
    send.send(("end", case.name))


def tidy(device: str) -> None:
    """Free what a case held, for the next one's figures."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST]
