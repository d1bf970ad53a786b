"""Runs of several processes in which something fails: all processes end soon, with one message that says what it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, environment, free_port, metrics, numbers, run, start, train, wait_until, write_run

FOREVER = ["--training.steps=1000000", "--training.global_batch_size=4", "--validation.every_steps=0"]
# Takes the place of launch/pretrain.py; what its first lines change fails on rank 1.
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import launch.pretrain
from launch.common import run_command
from pretrain.checkpoints.store import CheckpointStore
from pretrain.loop.trainer import Trainer
{failure}
run_command(launch.pretrain.main)
"""
STANDS_STILL = """
advance = Trainer.advance
def stand_still(trainer):
    if trainer.step == 3:
        time.sleep(1000)
    advance(trainer)
if os.environ["RANK"] == "1":
    Trainer.advance = stand_still
"""
HAS_A_BUG = """
def report(trainer, *_):
    raise KeyError("no such figure")
if os.environ["RANK"] == "1":
    Trainer._report = report
"""
DIES_WHILE_SAVING = """
write_own = CheckpointStore._write_own
def die(store, partial, save_engine):
    if "00000004" in partial.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_own(store, partial, save_engine)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    CheckpointStore._write_own = die
"""


@pytest.fixture
def config(tmp_path: Path, prepared: Path) -> Iterator[Path]:
    """A tiny run's configuration. No process that has it on its command line is left at the end, however the test ends."""
    path = write_run(tmp_path, prepared)
    yield path
    for process in with_config(path):
        process.kill()


def with_config(config: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(config) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def ranks_of(config: Path) -> dict[int, psutil.Process]:
    return {int(process.environ()["RANK"]): process for process in with_config(config) if "RANK" in process.environ()}


def steps(config: Path) -> int:
    written = config.with_suffix("") / "metrics.jsonl"
    return len(written.read_text().splitlines()) if written.exists() else 0


def script(folder: Path, failure: str) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT), failure=failure))
    return str(path)


def end_of(process: subprocess.Popen[str], config: Path, seconds: float = 60) -> str:
    """The one error of a run that ends by itself, with what follows it; nothing of the run is left then."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still runs after {seconds} s\n{process.communicate()[1]}") from None
    assert process.returncode != 0
    assert with_config(config) == []
    text: str = errors
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return text[text.index(lines[0]) :]


@pytest.mark.parametrize(
    ("launcher", "number", "rank", "expected"),
    [
        ("deepspeed", signal.SIGKILL, 1, "is gone (killed, or crashed); it stood"),
        ("torchrun", signal.SIGSTOP, 1, "has not been heard of for"),
        ("deepspeed", signal.SIGSTOP, 0, "does not answer: its store at 127.0.0.1:"),
    ],
)
def test_a_rank_that_is_lost_ends_all(config: Path, launcher: str, number: signal.Signals, rank: int, expected: str) -> None:
    arguments = ["launch/pretrain.py", "--config", str(config), *FOREVER, "--parallel.lost_after_seconds=3"]
    process = start(arguments, launcher, 2)
    wait_until(lambda: steps(config) >= 2)
    time.sleep(1.5)  # so that the last sign of life tells of a step
    lost = ranks_of(config)[rank]
    lost.send_signal(number)
    error = end_of(process, config, seconds=25)  # launchers alone take 30 for a stopped process
    assert error.startswith(f"error: rank {rank} (host "), error
    assert f", pid {lost.pid}, cpu) {expected}" in error
    assert "it stood after step " in error
    assert f"\n  rank {1 - rank} stands after step " in error
    assert "Connection closed by peer" not in error  # the other rank's trouble, which is not the cause


def test_when_nothing_moves_all_say_where_they_stand(config: Path) -> None:
    arguments = [script(config.parent, STANDS_STILL), "--config", str(config), "--parallel.timeout_minutes=0.2"]
    error = end_of(start(arguments, "deepspeed", 2), config)
    assert re.match(r"error: nothing has moved for 1[2-9] s \(parallel.timeout_minutes\)\n", error), error
    assert "\n  rank 0 stands after step 3 in pretrain/" in error
    assert "\n  rank 1 stands after step 3 in pretrain/loop/trainer.py:" in error


def test_a_bug_on_one_rank_is_shown_with_its_traceback_and_ends_all(config: Path) -> None:
    process = start([script(config.parent, HAS_A_BUG), "--config", str(config), *FOREVER], "torchrun", 2)
    process_errors = end_of(process, config)
    assert process_errors.startswith("error: rank 1 (host ")
    assert "failed after step 0 in pretrain/loop/trainer.py:" in process_errors
    assert "KeyError: 'no such figure'" in process_errors.splitlines()[0]


def test_a_rank_killed_while_it_saves_is_restarted_from_the_checkpoint_before(config: Path) -> None:
    whole = train(config, f"--run.folder={config.parent / 'whole'}", launcher="torchrun", processes=2)
    arguments = ["--max-restarts=1", script(config.parent, DIES_WHILE_SAVING), "--config", str(config), "--resume=auto"]
    result = run([*arguments, "--checkpoint.every_steps=2"], "torchrun", 2)
    assert result.returncode == 0, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "rank 1 " in error
    assert "is gone (killed, or crashed)" in error
    assert "step_00000002 at step 2\n" in result.stdout
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert numbers(metrics(config.with_suffix("")), *names) == numbers(whole, *names)


def by_hand(rank: int, port: int, config: Path, *overrides: str, root: Path = ROOT) -> subprocess.Popen[str]:
    """Start one of two ranks without a launcher."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "launch/pretrain.py", "--config", str(config), *overrides],
        cwd=root,
        env={**environment(), **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_sigterm_of_one_rank_saves_and_ends_all_with_status_0(config: Path) -> None:
    port = free_port()
    processes = [by_hand(rank, port, config, *FOREVER) for rank in (0, 1)]
    wait_until(lambda: steps(config) >= 2)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resume with --resume=auto" in outputs[0][0]
    assert len(list((config.with_suffix("") / "checkpoints").glob("step_*/complete.json"))) == 1


def test_ranks_that_do_not_run_the_same_thing_are_told_what_differs(config: Path) -> None:
    copy = config.parent / "copy"
    for package in ("configs", "data_pipeline", "launch", "model", "pretrain"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "model" / "block.py").open("a") as file:
        file.write("# changed\n")
    port = free_port()
    processes = [by_hand(0, port, config), by_hand(1, port, config, "--optimizer.lr=0.5", root=copy)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    errors = "".join(errors for _, errors in outputs)
    assert errors.count("error:") == 1, errors
    assert errors.startswith("error: the ranks do not run the same thing\n  optimizer.lr: 0.01 on rank 0 (")
    assert "; 0.5 on rank 1 (" in errors
    assert "\n  model/block.py: " in errors
    assert len(errors.splitlines()) == 3  # nothing else differs
    assert not config.with_suffix("").exists()


def test_ranks_that_do_not_come_are_named(config: Path) -> None:
    ports, limit = (free_port(), free_port()), "--parallel.timeout_minutes=0.1"
    processes = [by_hand(0, ports[0], config, limit), by_hand(1, ports[1], config, limit)]
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert outputs[0].startswith(f"error: rank 1 of 2 did not reach 127.0.0.1:{ports[0]} within 6 s; rank 0 (")
    assert outputs[1].startswith("error: [rank 1] rank 1 (host ")
    assert f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{ports[1]} has not answered for " in outputs[1]
    assert all(len(output.splitlines()) == 1 for output in outputs)
