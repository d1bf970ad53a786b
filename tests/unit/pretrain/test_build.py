"""A hook with a state of its own: checkpoints hold it, and a resumed run has it back."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from configs.errors import UserError
from pretrain.checkpoints.folder import read_marker
from pretrain.checkpoints.store import CheckpointStore
from pretrain.loop.hooks import Checkpoints, Hook
from tests.helpers import free_port, launched_as, resolved, run_ranks, write_run

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

FILE = "steps.json"


class Steps(Hook):
    """Remembers the steps that it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def after_step(self, trainer: Trainer) -> None:
        self.seen.append(trainer.step)

    def save(self, folder: Path) -> list[Path]:
        path = folder / FILE
        path.write_text(json.dumps(self.seen))
        return [path]

    def load(self, folder: Path) -> str | None:
        self.seen = json.loads((folder / FILE).read_text())
        return f"steps   {len(self.seen)} seen"


def train_twice(rank: int, port: int, path: Path) -> None:
    from pretrain.build import build_trainer, make_resumer

    config = resolved(path, ["--checkpoint.every_steps=2", "--training.steps=5"])
    store = CheckpointStore(Path(config.run.folder))
    with launched_as(rank, 1, port) as opened:
        for resumed in (False, True):
            with opened(config.parallel) as layout:
                resumer = make_resumer(config, layout)
                start = resumer.check([store.path(4)]) if resumed else None
                trainer = build_trainer(config, layout, start, [steps := Steps()])
                trainer.run()
                trainer.close()
            assert steps.seen == [1, 2, 3, 4, 5]
            assert trainer.first_step == 4 * resumed
    for step in (4, 5):  # the hook has seen the step by the time it is saved
        folder = store.path(step)
        assert json.loads((folder / FILE).read_text()) == list(range(1, step + 1))
        assert FILE in read_marker(folder).files


def fill_the_disk_of_a_rank(rank: int, port: int, path: Path) -> None:
    """Rank 1 cannot write its parts, and then it can."""
    from pretrain.build import build_trainer

    config = resolved(path, ["--training.steps=6", "--checkpoint.every_steps=2"])
    with launched_as(rank, 2, port) as opened, opened(config.parallel) as layout:
        trainer = build_trainer(config, layout)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        trainer.advance()
        trainer.advance()
        checkpoints = trainer.hook(Checkpoints)
        with pytest.raises(UserError, match=r"could not be saved .*File too large.*there is no earlier one"):
            checkpoints.saver.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.run()
        trainer.close()
        assert checkpoints.saver.store.steps() == [4, 6]


def test_a_checkpoint_that_a_rank_cannot_write_ends_nothing(tmp_path: Path, prepared: Path) -> None:
    run_ranks(fill_the_disk_of_a_rank, 2, free_port(), write_run(tmp_path, prepared), seconds=60)


class Spoils(Hook):
    """Leaves a weight on one rank that is no number, and says so to no one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def at_end(self, trainer: Trainer) -> None:
        if trainer.layout.rank == self.rank:
            next(part.tensor for part in trainer.backend.state().parts if part.tensor.numel()).fill_(math.inf)


def spoil_a_weight(rank: int, port: int, path: Path) -> None:
    from pretrain.build import build_trainer

    with launched_as(rank, 2, port) as opened:
        for backend in ("deepspeed", "fsdp"):
            config = resolved(path, ["--training.steps=3", f"--backend={backend}", f"--run.folder={path.parent}/{backend}"])
            with opened(config.parallel) as layout:
                trainer = build_trainer(config, layout, None, [Spoils(rank=1)])
                message = r"^step 3: the weights or the optimizer's state are not finite \(model/.*\): training diverged; start"
                with pytest.raises(UserError, match=message):
                    trainer.run()
                trainer.close()
                assert CheckpointStore(Path(config.run.folder)).steps() == []


def test_weights_that_are_not_finite_are_not_saved_by_any_rank(tmp_path: Path, prepared: Path) -> None:
    run_ranks(spoil_a_weight, 2, free_port(), write_run(tmp_path, prepared), seconds=60)


def test_the_state_of_a_hook_is_in_checkpoints(tmp_path: Path, prepared: Path) -> None:
    run_ranks(train_twice, 1, free_port(), write_run(tmp_path, prepared))
