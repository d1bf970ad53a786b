"""A sweep's children from start to end: several at once, tried again, stopped, out of time, refused.

In place of training runs a small program that writes what a run writes; `run.seed` chooses what it does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from launch.common import RULES
from pretrain.studies import machine
from pretrain.studies.children import Checker
from pretrain.studies.records import OUTCOME, read_outcome
from pretrain.studies.screen import Screen, table
from pretrain.studies.study import read_study
from pretrain.studies.sweep import Sweep, failures, read_time
from tests.helpers import ROOT, wait_until, write_run

FINISHES, FAILS, CRASHES, WAITS, REFUSES_TO_END = range(5)
PROGRAM = """
import json, os, signal, sys, time
values = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, does, steps = values["run.folder"], int(values["run.seed"]), int(values["training.steps"])
step = 0

def reach(number):
    global step
    step = number
    with open(f"{folder}/metrics.jsonl", "a") as file:
        print(json.dumps({"step": step, "loss": 2.0, "tokens_per_second": 1000.0}), file=file)

for number in (2, steps):
    os.makedirs(f"{folder}/checkpoints/step_{number:08d}", exist_ok=True)
reach(2)
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
first = not os.path.exists(f"{folder}/again")
open(f"{folder}/again", "w").close()
if does == 1:
    sys.exit("warning: odd\\nerror: no such data\\nmore words")
if does == 2:
    os.kill(os.getpid(), signal.SIGSEGV)
if does == 3 and first:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    open(f"{folder}/ready", "w").close()
    time.sleep(60)
if does == 4:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"{folder}/ready", "w").close()
    time.sleep(60)
reach(steps)
"""

Make = Callable[..., Sweep]


@pytest.fixture
def sweep(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a sweep of children that do what is said."""
    base = write_run(tmp_path, prepared)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(machine, "PRETRAIN", program)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pretrain.studies.sweep.POLL", 0.02)

    def make(*does: int, jobs: int = 2, hours: float | None = None, **keys: Any) -> Sweep:
        parts = {"p": {"list": [{"label": f"c{number}", "run.seed": seed} for number, seed in enumerate(does)]}}
        tree = {"name": "s", "folder": str(tmp_path / "study"), "base": str(base), "set": {"training.steps": 6}, "parts": parts}
        (tmp_path / "study.yaml").write_text(json.dumps({**tree, **keys}))
        children = Checker(read_study(str(tmp_path / "study.yaml")), RULES, ()).children()
        children[0].study.folder.mkdir(exist_ok=True)
        return Sweep(children, [machine.Share(3)] * jobs, Screen(), hours)

    return make


def statuses(sweep: Sweep) -> dict[str, tuple[str, int]]:
    """Status and attempts of each child, as its file says."""
    outcomes = {child.id: read_outcome(child.folder) for child in sweep.children}
    return {name: (outcome.status, outcome.attempts) for name, outcome in outcomes.items() if outcome is not None}


def test_failed_children_are_reported_and_tried_again(sweep: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = sweep(FINISHES, FAILS, CRASHES, FINISHES)
    assert first.run() is None
    assert statuses(first) == {"c0": ("finished", 1), "c1": ("failed", 1), "c2": ("failed", 1), "c3": ("finished", 1)}
    error = str(failures(first))
    assert error.startswith("2 children failed;")
    assert error.endswith("\n  p/c1: no such data\n  p/c2: killed by SIGSEGV")
    assert "4 left" not in capsys.readouterr().out.splitlines()[-1]
    folder = first.children[0].folder
    assert not (folder / "checkpoints").exists()
    assert (first.children[1].folder / "checkpoints").exists()  # to resume from
    assert "threads 3\n" in (folder / "output.log").read_text()
    assert json.loads((folder / "child.json").read_text())["axes"] == {"label": "c0", "run.seed": "0"}

    left = sweep(FINISHES, FAILS, CRASHES, FINISHES)
    left.run(leave_failed=True)
    assert statuses(left) == statuses(first)
    assert left.failed() == ["p/c1", "p/c2"]

    again = sweep(FINISHES, FAILS, CRASHES, FINISHES)
    again.run()
    assert statuses(again) == {"c0": ("finished", 1), "c1": ("failed", 2), "c2": ("failed", 2), "c3": ("finished", 1)}


def test_the_newest_checkpoint_is_kept_if_asked(sweep: Make) -> None:
    made = sweep(FINISHES, checkpoints="last")
    made.run()
    assert [path.name for path in (made.children[0].folder / "checkpoints").iterdir()] == ["step_00000006"]


def interrupt_when_ready(made: Sweep, *numbers: int, pause: float = 0.0) -> threading.Thread:
    """Sends this process signals once all children are ready."""

    def send() -> None:
        wait_until(lambda: all((child.folder / "ready").exists() for child in made.children[:2]), seconds=20)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_signal_stops_the_children_and_the_next_start_resumes_them(sweep: Make) -> None:
    made = sweep(WAITS, WAITS, FINISHES)
    thread = interrupt_when_ready(made, signal.SIGTERM)
    assert made.run() == signal.SIGTERM
    thread.join()
    assert statuses(made) == {"c0": ("stopped", 1), "c1": ("stopped", 1)}
    again = sweep(WAITS, WAITS, FINISHES)
    assert again.run() is None
    assert statuses(again) == {"c0": ("finished", 2), "c1": ("finished", 2), "c2": ("finished", 1)}


def test_a_second_signal_kills(sweep: Make) -> None:
    made = sweep(REFUSES_TO_END, REFUSES_TO_END)
    thread = interrupt_when_ready(made, signal.SIGINT, signal.SIGINT, pause=1.1)
    assert made.run() == signal.SIGINT
    thread.join()
    assert statuses(made) == {"c0": ("stopped", 1), "c1": ("stopped", 1)}


def test_no_child_starts_when_the_hours_of_all_sweeps_are_spent(sweep: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first = sweep(FINISHES, jobs=1)
    first.run()
    spent = read_time(first.folder)
    assert 0 < spent < 60
    more = sweep(FINISHES, FINISHES, jobs=1, hours=spent / 3600)
    assert more.run() is None
    assert statuses(more) == {"c0": ("finished", 1)}
    assert "1 of 2 done, 0 failed, 1 left, budget.hours" in capsys.readouterr().out


def test_a_changed_child_is_refused(sweep: Make) -> None:
    sweep(FINISHES).run()
    with pytest.raises(UserError) as caught:
        sweep(FINISHES, set={"training.steps": 7}).run()
    folder = caught.value.args[0].split(": ")[0]
    assert folder.endswith("study/p/c0")
    assert 'was started with {"set": {"training.steps": 6}}, and the study has {"set": {"training.steps": 7}}' in str(
        caught.value
    )


def test_a_damaged_outcome_is_named(sweep: Make) -> None:
    made = sweep(FINISHES)
    made.run()
    (made.children[0].folder / OUTCOME).write_text('{"status": "finished"}')
    with pytest.raises(UserError, match=r"outcome\.json: is damaged"):
        sweep(FINISHES).run()


def test_the_table_says_where_each_child_stands(sweep: Make) -> None:
    made = sweep(WAITS, WAITS, FINISHES)
    lines: list[str] = []

    def look() -> None:
        wait_until(lambda: all((child.folder / "ready").exists() for child in made.children[:2]), seconds=20)
        lines.extend(table(made))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=look)
    thread.start()
    made.run()
    thread.join()
    assert lines[0].startswith("sweep    0 of 3 done, 0 failed, 1 left, 2 running, 2,000 tok/s, 0:0")
    # 2 of 6 steps of 128 tokens are done, the others take half a second at 1,000 tokens a second.
    assert lines[1] == "         p/c0 | step 2/6 | loss 2.0000 | 1,000 tok/s | left 0:00:01"
    assert len(lines) == 3


def test_a_terminal_shows_one_table_below_the_children_that_have_ended(
    sweep: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.studies.screen.REDRAWN", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    made = sweep(FINISHES, FAILS)
    made.screen = Screen(terminal=True)
    made.run()
    shown, longest, drawn = list[str](), 0, 0
    for text in re.split(r"(\x1b\[\d+F\x1b\[J)", capsys.readouterr().out):
        if match := re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", text):
            table_lines = shown[-int(match[1]) :]
            assert table_lines[0].startswith("sweep")
            longest, drawn = max(longest, *map(len, table_lines)), drawn + 1
            del shown[-int(match[1]) :]
        else:
            shown += text.splitlines()
    assert drawn > 2
    assert longest == 39
    assert sorted(line.split(" after ")[0] for line in shown[:-1]) == ["failed   p/c1", "finished p/c0"]
    assert shown[-1].startswith("sweep    1 of 2 done, 1 failed, 0 left; ")


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5,7")
    assert [share.environment()["CUDA_VISIBLE_DEVICES"] for share in machine.shares(2, 2)] == ["0,1", "5,7"]
    with pytest.raises(UserError, match="pass --jobs 1"):
        machine.shares(2, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = len(os.sched_getaffinity(0))
    assert machine.shares(1, 1) == [machine.Share(cores)]
    assert machine.shares(cores, 2)[0].threads == 1


def test_a_child_gets_a_signal_when_its_sweep_is_killed(tmp_path: Path) -> None:
    waits = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit(open({str(tmp_path / 'told')!r}, 'w').close()))"
    waits += f"; open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)"
    starts = "import os, sys, time; from pretrain.studies import machine; "
    starts += f"machine.start([sys.executable, '-c', {waits!r}], dict(os.environ), sys.stdout); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", starts], cwd=ROOT)
    wait_until((tmp_path / "ready").exists, seconds=20)
    process.kill()
    process.wait()
    wait_until((tmp_path / "told").exists, seconds=20)
