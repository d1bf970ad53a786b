"""What a run with pruned heads does besides training: measure its loss at once, keep the report of the vote up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pretrain.distributed.collectives import gather_objects, together
from pretrain.grouping.origin import read_origin
from pretrain.grouping.report.outcome import SAMPLES, update_report, validation_of
from pretrain.loop.hooks import Hook, Validation

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer


class PrunedRun(Hook):
    """The validation loss directly after pruning, and the report in the folder of the run whose heads were pruned."""

    priority = 95  # after checkpoints: a page that cannot be written costs nothing else

    def __init__(self, voted: Path, step: int) -> None:
        """`voted` is the folder of the run that voted after step `step`."""
        self.voted, self.step = voted, step

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The hook of the run in `folder`, None if it was not pruned; every rank calls it, and the first decides for all."""
        found: list[Any] = []
        together(lambda: found.append(read_origin(folder)), main_only=True)
        (origin,) = gather_objects(found)[0]
        return None if origin is None else cls(*origin)

    def begin(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            validate_once(trainer)
        self._update(trainer)

    def at_end(self, trainer: Trainer) -> None:
        self._update(trainer)

    def _update(self, trainer: Trainer) -> None:
        together(lambda: update_report(self.voted, self.step, trainer.config), main_only=True)


def validate_once(trainer: Trainer) -> None:
    """Validate the model as it is, unless the run's metrics have this step's loss of as many samples; every rank calls it."""
    run, step, validation = Path(trainer.config.run.folder), trainer.step, trainer.hook(Validation)
    known: list[bool] = []

    def look() -> None:
        line = validation_of(run, step, step)
        known.append(line is not None and line.get(SAMPLES) == validation.samples)

    together(look, main_only=True)
    if not gather_objects(known)[0][0]:
        validation.validate(trainer)
