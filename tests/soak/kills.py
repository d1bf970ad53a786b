"""Kills: a run that is killed at any moment and started again ends as if nothing had happened, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import write_run
from tests.soak.jobs import RANKS, Job, kill, launch
from tests.soak.pairs import UNLIKE, checkpoint, different_files

END, EVERY = 24, 3  # steps of a run, and between checkpoints
MOST = 5  # kills of one run
ENDS_WITHIN, FINISHES_WITHIN = 180.0, 600.0  # seconds: after a kill, and without one
SETTINGS = [
    f"--training.steps={END}",
    f"--checkpoint.every_steps={EVERY}",
    "--model.dropout=0.1",
    "--validation.every_steps=6",
    "--logging.tensorboard=true",
    "--resume=auto",
]
BF16 = "--training.precision=bf16"
GROUPED = [
    "--training.skip.spike_sigma=4",
    "--gha.stage=constrain",
    "--gha.groups=3",
    "--gha.gram_decay=0.5",
    "--gha.regroup_every=2",
]
ENGINES: dict[str, tuple[tuple[str, ...], list[str]]] = {  # launchers, settings
    "ZeRO 2": (("deepspeed", "torchrun"), ["--parallel.zero_stage=2", BF16, *GROUPED]),
    "pipeline": (("deepspeed", "torchrun"), ["--parallel.pipeline=2", BF16]),
    "FSDP": (("torchrun",), ["--backend=fsdp", BF16]),
}
PHASES = ("start", "resume", "step", "save", "commit", "figures", "index")
OFTEN = (2, 2, 2, 3, 3, 1, 1)


@dataclass(frozen=True)
class Moment:
    """When whom to kill: in which phase, how far into it, and how long after that."""

    phase: str
    rank: int  # whose operations are counted
    share: float  # of the phase's operations, steps or time
    delay: float  # seconds; 0: before the operation
    victim: str

    @classmethod
    def drawn(cls, draw: random.Random, launched: bool, resumes: bool) -> Moment:
        phase = draw.choices(PHASES, OFTEN)[0]
        phase = "start" if phase == "resume" and not resumes else phase
        rank = draw.randrange(RANKS) if phase in ("resume", "save") else 0  # rank 0 does the rest alone
        victims = ["rank 0", "rank 1", "job", *(["launcher"] if launched else [])]
        delay = draw.choice((0.0, draw.random() * 0.02))
        return cls(phase, rank, draw.random(), delay, draw.choice(victims))


@dataclass
class Reference:
    """An undisturbed run, and how many operations of each phase its ranks did; with those of a run that resumes from it."""

    run: Path
    operations: list[Counter[str]]


@dataclass
class Killed:
    """What became of a run that was killed."""

    kills: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    output: str = ""


class Kills:
    """Runs of one engine in `folder`, on `data`."""

    def __init__(self, engine: str, folder: Path, data: Path) -> None:
        self.engine, self.folder, self.data = engine, folder, data
        self.launchers, self.settings = ENGINES[engine]
        folder.mkdir(parents=True, exist_ok=True)
        self.config = write_run(folder, data)
        self.start_seconds: dict[str, float] = {}
        self.reference = self._undisturbed()

    def case(self, draw: random.Random, name: str, launcher: str, most: int = MOST) -> Killed:
        """One run, killed up to `most` times, until it has finished."""
        run, result = self.folder / name, Killed()
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(self.data / "index")  # which a run builds as it reads
        while not result.faults:
            resumes, complete = any(run.glob("checkpoints/step_*/complete.json")), checkpoint(run, END).exists()
            moment = Moment.drawn(draw, launcher != "forked", resumes) if len(result.kills) < most else None
            if not self._start(run, "forked" if complete else launcher, moment, result):
                break
        if not result.faults:
            result.faults += differences(self.reference.run, run, self.data)
        if not result.faults:
            shutil.rmtree(run)
        return result

    def _start(self, run: Path, launcher: str, moment: Moment | None, result: Killed) -> bool:
        """Start the run once; whether it was killed. Otherwise it has finished, or a fault is noted."""
        order = self._order(run, moment)
        job, killed = launch(self._arguments(run), order, launcher), False
        try:
            if moment is not None and self._comes(moment, run, job, order, launcher):
                killed = True
                who = kill(job, moment.victim, moment.share)
                order.with_suffix(".requested.done").touch()
                result.kills.append(f"{moment.phase} {moment.share:.2f} ({who})")
            status = _end(job, ENDS_WITHIN if killed else FINISHES_WITHIN, result)
            if status and not killed:
                result.faults.append(f"ended with status {status}")
            result.output = job.output()
            return killed
        finally:
            job.close()

    def _comes(self, moment: Moment, run: Path, job: Job, order: Path, launcher: str) -> bool:
        """Wait for the moment; False if the job ends before."""
        began = looked = time.monotonic()
        requested, last = order.with_suffix(".requested"), _last_step(run) or 0

        def came() -> bool:
            if moment.phase == "start":
                return time.monotonic() - began > moment.share * self.start_seconds.get(launcher, 5.0)
            if moment.phase == "step":
                return (_last_step(run) or 0) > last + moment.share * max(0, END - last - 1)  # never, if all are done
            return requested.exists()

        while not came():
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                if job.status() is not None or looked - began > FINISHES_WITHIN:
                    return False
                if (_last_step(run) or 0) != last:
                    self.start_seconds.setdefault(launcher, looked - began)
            time.sleep(0.001)
        time.sleep(moment.delay)
        return job.status() is None

    def _arguments(self, run: Path) -> list[str]:
        return ["--config", str(self.config), *SETTINGS, *self.settings, f"--run.folder={run}"]

    def _order(self, run: Path, moment: Moment | None) -> Path:
        """What the ranks are told to note and to report."""
        order = run.with_name(f"{run.name}.order.json")
        for old in run.parent.glob(f"{run.name}.order.*"):
            old.unlink()
        wanted = None
        if moment is not None and moment.phase not in ("start", "step"):
            operations = self.reference.operations[moment.rank][moment.phase]
            count = 1 + int(moment.share * operations)
            wanted = {"phase": moment.phase, "rank": moment.rank, "count": count, "waits": moment.delay == 0}
        files = {name: str(order.with_suffix(f".{name}")) for name in ("notes", "requested")}
        order.write_text(json.dumps({"run": str(run), "data": str(self.data), "wanted": wanted, **files}))
        return order

    def _undisturbed(self) -> Reference:
        whole, later = self.folder / "whole", self.folder / "later"
        reference = Reference(whole, [Counter() for _ in range(RANKS)])
        for old in (whole, later, self.data / "index"):
            shutil.rmtree(old, ignore_errors=True)
        operations = self._operations(whole)
        shutil.copytree(whole, later)
        shutil.rmtree(checkpoint(later, END))
        resumed = self._operations(later)
        shutil.rmtree(later)
        for rank in range(RANKS):
            saves = END // EVERY
            for phase in ("save", "commit"):  # of two saves, so that most moments come
                reference.operations[rank][phase] = max(1, 2 * operations[rank][phase] // saves)
            reference.operations[rank]["resume"] = max(1, resumed[rank]["resume"])
            for phase in ("figures", "index"):
                reference.operations[rank][phase] = max(1, operations[rank][phase])
        return reference

    def _operations(self, run: Path) -> list[Counter[str]]:
        """Run to the end; what each rank did, counted by phase."""
        result = Killed()
        self._start(run, "forked", None, result)
        if result.faults:
            raise RuntimeError(f"{self.engine}, undisturbed: {result.faults}\n{result.output}")
        notes = [run.with_name(f"{run.name}.order.notes.{rank}").read_text().splitlines() for rank in range(RANKS)]
        return [Counter(line.partition(" ")[0] for line in of_rank) for of_rank in notes]


def _end(job: Job, seconds: float, result: Killed) -> int | None:
    deadline = time.monotonic() + seconds
    while (status := job.status()) is None:
        if time.monotonic() > deadline:
            result.faults.append(f"{', '.join(job.living())} still there after {seconds:.0f} s")
            return None
        time.sleep(0.1)
    return status


def differences(whole: Path, run: Path, data: Path) -> list[str]:
    """What a finished run has that the undisturbed one has not, or the other way; and what was left beside the data."""
    faults = different_files(checkpoint(whole, END), checkpoint(run, END))
    one, other = (_lines(folder) for folder in (whole, run))
    if one != other:
        faults.append(f"{run}: metrics.jsonl of steps {_steps(other)} is not that of {_steps(one)}, or other figures")
    shown, expected = (scalars(folder) for folder in (run, whole))
    for tag in sorted(shown.keys() | expected.keys()):
        if shown.get(tag) != expected.get(tag):
            steps = [[step for step, _ in of.get(tag, [])] for of in (shown, expected)]
            faults.append(f"{run}: TensorBoard shows {tag} of steps {steps[0]}, not {steps[1]}, or other values")
    newest, right = (_latest(folder) for folder in (run, whole))
    faults += [f"{run}: latest names {newest}"] * (newest != right)
    here, there = (_names(folder) for folder in (run, whole))
    faults += [f"{run}: left {name}" for name in sorted(here - there)]
    faults += [f"{run}: lacks {name}" for name in sorted(there - here)]
    return faults + [f"{data}: left {path.name}" for path in data.rglob(".*")]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the steps and values of each tag, but for those that no two runs share."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each restart
    shown = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()  # 0: all
    tags: Sequence[str] = [tag for tag in shown.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in tags}


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in UNLIKE} for line in lines]


def _steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]


def _latest(run: Path) -> str | None:
    file = run / "checkpoints/latest"
    return file.read_text() if file.exists() else None


def _last_step(run: Path) -> int | None:
    """The last step in metrics.jsonl, which may end in half a line."""
    try:
        text = (run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return int(json.loads(text)["step"])
    except (OSError, ValueError):
        return None


def _names(run: Path) -> set[str]:
    """All files and folders of a run; TensorBoard's, of which each start writes one, count as one."""
    names = {str(path.relative_to(run)) for path in run.rglob("*")}
    return {"events" if name.startswith("events.out.tfevents") else name for name in names}
