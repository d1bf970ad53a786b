"""What happens between steps: validation, checkpoints, and whatever else a run adds to its loop as a hook."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pretrain.loop.evaluate import evaluate

if TYPE_CHECKING:
    from data_pipeline.read.loader import Batch, ValidationLoader
    from pretrain.loop.trainer import Trainer


class Hook:
    """A part of a run that acts between steps. Subclasses replace what they need; all ranks call each method together.

    Hooks act in the order of `priority`, lowest first; those of one priority act in the order in which they were given. Those
    with a state act before `Checkpoints`, so that it saves what they know of the step.
    """

    priority: ClassVar[int] = 50

    def begin(self, trainer: Trainer) -> None:
        """Called once, before the first step that this process takes."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after optimizer step `trainer.step`, counted from 1. To end the loop, set `trainer.done` on every rank."""

    def at_end(self, trainer: Trainer) -> None:
        """Called after the loop, whether the run is complete or interrupted."""

    def save(self, folder: Path) -> list[Path]:
        """Write the hook's own state into a checkpoint that is being written; the files that this rank wrote.

        No collectives here: a rank whose disk is full leaves by an error. What ranks must gather, gather in `after_step`.
        """
        return []

    def load(self, folder: Path) -> str | None:
        """Restore what `save` wrote into a checkpoint; a line for the user, if there is something to say.

        A checkpoint of a run without this hook lacks its files. All ranks raise UserError for files that do not fit.
        """
        return None


class Validation(Hook):
    """Figures of held-out text every N steps and after the run's last step; skipped when interrupted."""

    def __init__(self, loader: ValidationLoader, every_steps: int, text_bytes: Callable[[Batch], float]) -> None:
        """`text_bytes`: how many bytes of text the labels of a batch stand for."""
        self.loader = loader
        self.every_steps = every_steps
        self.text_bytes = text_bytes

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.step == trainer.config.training.steps
        if not trainer.stopped and (last or (self.every_steps and trainer.step % self.every_steps == 0)):
            self.validate(trainer)

    def validate(self, trainer: Trainer) -> None:
        """Write and show loss, perplexity and bits per byte of the model as it is; nothing if a signal interrupts it."""
        layout, backend = trainer.layout, trainer.backend
        result = evaluate(
            backend.eval_loss, self.loader, layout.device, layout.size("data"), trainer.agree_to_stop, self.text_bytes
        )
        if result is None:
            return
        if not math.isfinite(result.loss):
            raise trainer.diverged(f"validation loss {result.loss}")
        perplexity, bits = math.exp(min(result.loss, 700.0)), result.bits_per_byte
        figures = {"loss": result.loss, "perplexity": perplexity, "bits_per_byte": bits}
        trainer.metrics.write(trainer.step, {f"validation/{name}": value for name, value in figures.items()})
        in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
        trainer.progress.say(f"step {trainer.step}: validation loss {result.loss:.4f}, perplexity {perplexity:,.2f}{in_bits}")


class Checkpoints(Hook):
    """Save every N steps and at the end."""

    priority = 90  # after all hooks whose state it saves

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.saved_step: int | None = None

    def after_step(self, trainer: Trainer) -> None:
        if self.every_steps and trainer.step % self.every_steps == 0:
            self._save(trainer)

    def at_end(self, trainer: Trainer) -> None:
        if trainer.step > trainer.first_step and self.saved_step != trainer.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        folder = trainer.save(trainer.step)
        self.saved_step = trainer.step
        trainer.progress.say(f"step {trainer.step}: checkpoint {folder}")
