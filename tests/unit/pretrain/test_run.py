"""What a run decides around its loop: where it starts, what it refuses, which stage comes next, what it says at its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.gha.voting import Election
from pretrain import run
from pretrain.checkpoints.folder import TrainState
from pretrain.checkpoints.resume import Resumer
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from pretrain.loop.interruption import Interruption
from pretrain.report.progress import Progress
from pretrain.run import Session
from tests.helpers import write_run
from tests.random_checkpoint import write_checkpoint

ONE = Layout()
SCHEDULE = ("stage=schedule", "groups=2", "vote_at_step=3")


def configuration(folder: Path, *overrides: str, name: str = "run") -> Config:
    return load_config(write_run(folder, folder / "data", name), ["--model.attention=mha", *overrides]).resolved(300)


def gha(*fields: str) -> list[str]:
    return [f"--gha.{field}" for field in fields]


def save(config: Config, *steps: int) -> CheckpointStore:
    """Checkpoints of a run that hold next to nothing."""
    for step in steps:
        write_checkpoint(config, {"model": {"w": torch.zeros(1)}}, TrainState(step, 1, "d" * 64))
    return CheckpointStore(Path(config.run.folder))


def starting_point(store: CheckpointStore, resume: str) -> Path | None:
    config = configuration(store.folder.parent.parent)
    start = run._starting_point(Resumer(store, ONE, config, "d" * 64, "{}"), resume)
    return None if start is None else start.folder


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    store = save(configuration(tmp_path))
    assert starting_point(store, "none") is None
    assert starting_point(store, "auto") is None


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    store = save(configuration(tmp_path), 3)
    with pytest.raises(UserError, match=r"run/checkpoints: holds checkpoints already; pass --resume=auto, or another --run"):
        starting_point(store, "none")


@pytest.mark.parametrize("resume", ["none", "auto", "other"])
def test_damaged_metrics_are_an_error_before_anything_is_built(tmp_path: Path, resume: str) -> None:
    store = save(configuration(tmp_path))
    save(configuration(tmp_path, name="other"), 4)
    store.folder.parent.mkdir()
    (store.folder.parent / "metrics.jsonl").write_bytes(b"\x89PNG\r\n\x00\n")
    with pytest.raises(UserError, match=r"run/metrics\.jsonl: is damaged \(line 1 is no JSON object with a step\); mend it or"):
        starting_point(store, resume if resume != "other" else str(tmp_path / "other"))


def test_two_runs_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_lock", partial(run.run_lock, patience=0.0))
    folder = tmp_path / "new/run"
    with run._locked(folder):  # noqa: SIM117  # the second one is refused
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "), run._locked(folder):
            pass
    with run._locked(folder):
        pass


def test_changed_fields_are_named_with_both_values(tmp_path: Path) -> None:
    then = configuration(tmp_path)
    now = configuration(tmp_path, "--optimizer.lr=5e-3", "--training.steps=9", "--checkpoint.keep_every=4", "--backend=fsdp")
    assert sorted(run._changes(then, now)) == [
        "changed backend: 'deepspeed' → 'fsdp'",
        "changed checkpoint.keep_every: null → 4",
        "changed optimizer.lr: 0.01 → 0.005",
        "changed training.steps: 6 → 9",
    ]
    assert run._changes(then, then) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=rf"^run.folder = '{folder}': cannot be written \(Not a directory\)$"):
        run._together_in(folder, folder.mkdir)


class Parts:
    """A trainer as the stages see it, with what they do to it."""

    def __init__(self, config: Config, step: int = 0) -> None:
        self.config, self.step, self.stopped_by = config, step, None
        self.progress = Progress(config, ONE, 0)


@pytest.mark.parametrize(
    ("stopped_by", "step", "expected"),
    [
        (None, 6, "done    {run}: 6 steps; figures in metrics.jsonl\n"),
        (signal.SIGINT, 4, "stopped at step 4; "),
        (signal.SIGTERM, 0, "stopped before the first step; "),
    ],
)
def test_what_is_said_at_the_end(
    tmp_path: Path, stopped_by: int | None, step: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = Parts(configuration(tmp_path), step)
    run._say_end(trainer, stopped_by)
    assert capsys.readouterr().out.startswith(expected.format(run=tmp_path / "run"))


def test_what_the_model_logs_is_said_while_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("model.attention.kernels")
    with contextlib.suppress(ZeroDivisionError), run._spoken(Progress(configuration(tmp_path), ONE, 0)):
        logger.info("kernel chosen")
        raise ZeroDivisionError
    logger.info("too late")
    assert capsys.readouterr().out == "kernel chosen\n"


class Stages:
    """Notes which stages a run goes through; a vote has this election, or was stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped_by: int | None = None) -> None:
        self.passed: list[Any] = []
        self.stopped_by = stopped_by
        for name in ("train", "elect", "prune"):
            monkeypatch.setattr(run, f"_{name}", getattr(self, name))
        monkeypatch.setattr(run.gc, "collect", lambda: self.passed.append("memory is freed"))

    def train(self, config: Config, resume: str, session: Session) -> int | None:
        self.passed.append(("train", config.run.folder, config.gha.stage, config.model.num_heads, resume))
        return None

    def elect(self, config: Config, resume: str, session: Session) -> tuple[int | None, Election | None]:
        self.passed.append(("vote", config.run.folder, resume))
        election = Election(3, "value", "votes", 1, 1, 2, ())
        return (None, election) if self.stopped_by is None else (self.stopped_by, None)

    def prune(self, folder: Path, election: Election) -> None:
        """The heads of a checkpoint, two of eight left."""
        self.passed.append(("prune", str(folder), election.step))
        config = configuration(folder.parent, *gha(*SCHEDULE))
        save(config, 3)
        prune(config)


def prune(config: Config) -> None:
    """The run `pruned` of a schedule, at step 3, with two heads left."""
    folder = {"folder": f"{config.run.folder}/pruned"}
    model = config.model.model_copy(update={"num_heads": 2})
    off = config.gha.model_copy(update={"stage": "off"})
    save(config.model_copy(update={"run": config.run.model_copy(update=folder), "model": model, "gha": off}), 3)


def pass_stages(config: Config, resume: str) -> int | None:
    watchdog: Any = None
    return run._stages(config, resume, Session(ONE, Interruption(), watchdog))


@pytest.mark.parametrize("fields", [("stage=off",), ("stage=constrain", "groups=2")])
def test_a_run_without_a_vote_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: tuple[str, ...]) -> None:
    stages, config = Stages(monkeypatch), configuration(tmp_path, *gha(*fields))
    assert pass_stages(config, "auto") is None
    assert stages.passed == [("train", str(tmp_path / "run"), config.gha.stage, 8, "auto")]


def test_a_vote_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    config = configuration(tmp_path, *gha("stage=vote", "groups=2"))
    assert pass_stages(config, "auto") is None
    assert stages.passed == [("vote", str(tmp_path / "run"), "auto")]
    with pytest.raises(UserError, match=r"^gha\.stage = 'vote': needs --resume"):
        pass_stages(config, "none")


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_a_schedule_votes_prunes_and_trains_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str) -> None:
    stages = Stages(monkeypatch)
    assert pass_stages(configuration(tmp_path, *gha(*SCHEDULE)), resume) is None
    folder = str(tmp_path / "run")
    before, after = [("vote", folder, resume), "memory is freed"], [("prune", folder, 3)]
    assert stages.passed == [*before, *after, ("train", f"{folder}/pruned", "off", 2, "auto")]


def test_a_schedule_that_is_stopped_before_its_vote_is_done_prunes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch, stopped_by=signal.SIGTERM)
    assert pass_stages(configuration(tmp_path, *gha(*SCHEDULE)), "none") == signal.SIGTERM
    assert [name for name, *_ in stages.passed] == ["vote"]


@pytest.fixture
def pruned(tmp_path: Path) -> Config:
    """A schedule whose heads were pruned at step 3."""
    config = configuration(tmp_path, *gha(*SCHEDULE))
    save(config, 3)
    prune(config)
    return config


def test_a_schedule_whose_heads_are_pruned_resumes_with_what_is_left(pruned: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    assert pass_stages(pruned, "auto") is None
    assert stages.passed == [("train", f"{pruned.run.folder}/pruned", "off", 2, "auto")]


def test_a_schedule_whose_heads_are_pruned_does_not_start_again(pruned: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    with pytest.raises(UserError, match=r"run/pruned/checkpoints: holds checkpoints already; pass --resume=auto"):
        pass_stages(pruned, "none")
    assert stages.passed == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--gha.vote_at_step=4", "gha.vote_at_step = 4: the heads of {pruned} were chosen with 3; put it back, take another"),
        ("--gha.feature_map=output", "gha.feature_map = 'output': the heads of {pruned} were chosen with 'value'"),
        ("--model.num_heads=4", "model.num_heads = 4: the heads of {pruned} were chosen with 8"),
        ("--model.head_dim=8", "model.head_dim = 8: the heads of {pruned} were chosen with 4"),
    ],
)
def test_what_decided_which_heads_are_left_must_stay(pruned: Config, tmp_path: Path, change: str, message: str) -> None:
    changed = configuration(tmp_path, *gha(*SCHEDULE), change)
    with pytest.raises(UserError, match="^" + message.format(pruned=f"{pruned.run.folder}/pruned")):
        pass_stages(changed, "auto")


def test_what_did_not_decide_it_may_change(pruned: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    assert pass_stages(configuration(tmp_path, *gha(*SCHEDULE), "--optimizer.lr=1e-3", "--training.steps=9"), "auto") is None
    assert len(stages.passed) == 1
