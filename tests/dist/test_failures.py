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
from torch.distributed import TCPStore

from tests.helpers import (
    ROOT,
    forked,
    free_port,
    launched_environments,
    metrics,
    numbers,
    run,
    start,
    train,
    wait_until,
    write_run,
)
from tests.ranks import Ranks, run_script

FOREVER = ["--training.steps=1000000", "--training.global_batch_size=4", "--validation.every_steps=0"]
# Takes the place of launch/pretrain.py; what its first lines change fails on rank 1.
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import launch.pretrain
from launch.common import run_command
from pretrain.checkpoints.saver import Saver
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
HAS_A_BUG_IN_SAVING = """
def write(saver, *_):
    raise ValueError("two tensors have one name")
if os.environ["RANK"] == "1":
    Saver._write = write
"""
DIES_WHILE_SAVING = """
write = Saver._write
def die(saver, step, *others):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(saver, step, *others)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Saver._write = die
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
    return from_the_error(errors)


def end_without_launcher(ranks: Ranks, seconds: float = 60) -> str:
    """The same of two forked processes, which nobody but they themselves ends."""
    statuses = ranks.join(seconds)
    assert 0 not in statuses, statuses
    return from_the_error(ranks.errors(0) + ranks.errors(1))


def from_the_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return text[text.index(lines[0]) :]


LOSE = ["launch/pretrain.py", *FOREVER, "--parallel.lost_after_seconds=3"]


@pytest.mark.thorough
def test_a_rank_that_is_killed_ends_all_under_a_launcher(config: Path) -> None:
    process = start([*LOSE, "--config", str(config)], "deepspeed", 2)
    wait_for_two_steps(config)
    lost = ranks_of(config)[1]
    lost.send_signal(signal.SIGKILL)
    assert_says_who_is_lost(end_of(process, config, seconds=25), 1, lost.pid, "is gone (killed, or crashed); it was")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "is gone (killed, or crashed); it was"), (signal.SIGSTOP, "has not been heard of for")],
)
def test_a_rank_that_is_lost_ends_the_others(config: Path, number: signal.Signals, expected: str) -> None:
    with forked([*LOSE, "--backend=fsdp", "--config", str(config)], 2) as ranks:
        wait_for_two_steps(config)
        ranks.send_signal(1, number)
        assert_says_who_is_lost(end_without_launcher(ranks, seconds=25), 1, ranks.pid(1), expected)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, "is gone (killed, or crashed): its store at 127.0.0.1:"),
        (signal.SIGSTOP, "does not answer: its store at 127.0.0.1:"),
    ],
)
def test_when_the_rank_with_the_store_is_lost_the_other_ends(config: Path, number: signal.Signals, expected: str) -> None:
    with forked([*LOSE, "--config", str(config)], 2) as ranks:
        wait_for_two_steps(config)
        ranks.send_signal(0, number)
        assert_says_who_is_lost(end_without_launcher(ranks, seconds=25), 0, ranks.pid(0), expected)
        assert ranks.statuses() == [-signal.SIGKILL, 1]


def wait_for_two_steps(config: Path) -> None:
    wait_until(lambda: steps(config) >= 2, seconds=90)  # two interpreters that import everything, beside other tests
    time.sleep(1.5)  # so that the last sign of life tells of a step


def assert_says_who_is_lost(error: str, rank: int, pid: int, expected: str) -> None:
    assert error.startswith(f"error: rank {rank} (node "), error
    assert f", pid {pid}, cpu) {expected}" in error
    assert "it was after step " in error
    assert f"\n  rank {1 - rank} is after step " in error
    assert "Connection closed by peer" not in error  # the other rank's trouble, which is not the cause


def test_when_nothing_moves_all_say_where_they_stand(config: Path) -> None:
    arguments = [script(config.parent, STANDS_STILL), "--config", str(config), "--parallel.timeout_minutes=0.1"]
    with forked(arguments, 2) as ranks:
        error = end_without_launcher(ranks)
    assert re.match(r"error: nothing has moved for [6-9] s \(parallel.timeout_minutes\)\n", error), error
    assert "\n  rank 0 is after step 3 in pretrain/" in error
    assert "\n  rank 1 is after step 3 in pretrain/loop/trainer.py:" in error


def test_a_bug_on_one_rank_is_shown_with_its_traceback_and_ends_all(config: Path) -> None:
    with forked([script(config.parent, HAS_A_BUG), "--config", str(config), *FOREVER], 2) as ranks:
        error = end_without_launcher(ranks)
    assert error.startswith("error: rank 1 (node ")
    assert "failed after step 0 in pretrain/loop/trainer.py:" in error
    assert "KeyError: 'no such figure'" in error.splitlines()[0]


def test_a_bug_in_what_ranks_do_together_is_reported_by_its_rank(config: Path) -> None:
    with forked(
        [script(config.parent, HAS_A_BUG_IN_SAVING), "--config", str(config), "--checkpoint.every_steps=2"], 2
    ) as ranks:
        error = end_without_launcher(ranks)
        assert 'raise ValueError("two tensors have one name")' not in ranks.errors(0)
        assert "Traceback (most recent call last)" in ranks.errors(1)
    assert error.startswith("error: rank 1 (node ")
    assert re.search(r"failed after step [2-6] in ", error)
    assert "ValueError: two tensors have one name" in error.splitlines()[0]


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.thorough)])
def test_a_rank_killed_while_it_saves_is_restarted_from_the_checkpoint_before(config: Path, launcher: str) -> None:
    settings = ["--backend=fsdp"]  # starts sooner than deepspeed
    whole = train(config, *settings, f"--run.folder={config.parent / 'whole'}", processes=2)
    arguments = [script(config.parent, DIES_WHILE_SAVING), "--config", str(config), *settings]
    arguments += ["--resume=auto", "--checkpoint.every_steps=2"]
    if launcher == "torchrun":
        result = run(["--max-restarts=1", *arguments], "torchrun", 2)
        assert result.returncode == 0, result.stderr
        output, errors = result.stdout, result.stderr
    else:
        output, errors = started_again(arguments)
    (error,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "rank 1 " in error
    assert "is gone (killed, or crashed)" in error
    assert "step_00000002 at step 2\n" in output
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert numbers(metrics(config.with_suffix("")), *names) == numbers(whole, *names)


def started_again(arguments: list[str]) -> tuple[str, str]:
    """What two ranks write that torchrun's agent starts twice: the agent has the store, which is the same both times."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    output = errors = ""
    for count, statuses in enumerate(([1, -signal.SIGKILL], [0, 0])):
        with forked(arguments, 2, variables={**variables, "TORCHELASTIC_RESTART_COUNT": str(count)}) as ranks:
            assert ranks.join(60) == statuses, ranks.report()
            output += ranks.output(0)
            errors += ranks.errors(0)
    return output, errors


def test_sigterm_of_one_rank_saves_and_ends_all_with_status_0(config: Path) -> None:
    with forked(["launch/pretrain.py", "--config", str(config), *FOREVER], 2) as ranks:
        wait_until(lambda: steps(config) >= 2)
        ranks.send_signal(1, signal.SIGTERM)
        assert ranks.join(60) == [0, 0], ranks.report()
        assert "resume with --resume=auto" in ranks.output(0)
    assert len(list((config.with_suffix("") / "checkpoints").glob("step_*/complete.json"))) == 1


def test_ranks_that_do_not_run_the_same_thing_are_told_what_differs(config: Path) -> None:
    copy = config.parent / "copy"
    for package in ("configs", "data_pipeline", "launch", "model", "pretrain"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "model" / "block.py").open("a") as file:
        file.write("# changed\n")
    arguments, (first, second) = ["launch/pretrain.py", "--config", str(config)], launched_environments(2)
    with Ranks(run_script, [first], [(str(ROOT), *arguments)]) as ranks:
        command = [sys.executable, *arguments, "--optimizer.lr=0.5"]  # a new interpreter, which imports the copy
        other = subprocess.run(command, cwd=copy, env=second, capture_output=True, text=True, timeout=60)
        statuses, errors = ranks.join(60), ranks.errors(0) + other.stderr
    assert [*statuses, other.returncode] == [1, 1], errors
    assert errors.count("error:") == 1, errors
    assert errors.startswith("error: the ranks do not run the same thing\n  optimizer.lr: 0.01 on rank 0 (")
    assert "; 0.5 on rank 1 (" in errors
    assert "\n  model/block.py: " in errors
    assert len(errors.splitlines()) == 3  # nothing else differs
    assert not config.with_suffix("").exists()


def test_ranks_that_do_not_come_are_named(config: Path) -> None:
    environments = [{**own, "LOCAL_RANK": "0", "MASTER_PORT": str(free_port())} for own in launched_environments(2)]
    ports = [own["MASTER_PORT"] for own in environments]
    arguments = (str(ROOT), "launch/pretrain.py", "--config", str(config), "--parallel.timeout_minutes=0.05")
    with Ranks(run_script, environments, [arguments] * 2) as ranks:
        assert ranks.join(60) == [1, 1], ranks.report()
        errors = [ranks.errors(rank) for rank in (0, 1)]
    assert errors[0].startswith(f"error: rank 1 of 2 did not reach 127.0.0.1:{ports[0]} within 3 s; rank 0 (")
    assert errors[1].startswith("error: [rank 1] rank 1 (node ")
    assert f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{ports[1]} has not answered for " in errors[1]
    assert all(len(text.splitlines()) == 1 for text in errors)
