"""What a run with pruned heads does besides training: measure its loss at once, keep the report of the vote up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.distributed.collectives import gather_objects, together
from pretrain.grouping.report.outcome import update_report, validation_of
from pretrain.loop.hooks import Hook, Validation

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer


class PrunedRun(Hook):
    """The validation loss directly after pruning, and the report in the folder of the run whose heads were pruned."""

    priority = 95  # after checkpoints: a page that cannot be written costs nothing else

    def __init__(self, voted: Path, step: int) -> None:
        """`voted` is the folder of the run that voted after step `step`."""
        self.voted, self.step = voted, step

    def begin(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            validate_once(trainer)
        self._update(trainer)

    def at_end(self, trainer: Trainer) -> None:
        self._update(trainer)

    def _update(self, trainer: Trainer) -> None:
        together(lambda: update_report(self.voted, self.step, trainer.config), main_only=True)


def validate_once(trainer: Trainer) -> None:
    """Validate the model as it is, unless the run's metrics have this step's loss already; every rank calls it."""
    run, step = Path(trainer.config.run.folder), trainer.step
    known: list[bool] = []
    together(lambda: known.append(validation_of(run, step, step) is not None), main_only=True)
    if not gather_objects(known)[0][0]:
        trainer.hook(Validation).validate(trainer)
