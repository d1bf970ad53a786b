"""What happens between steps: validation, checkpoints. A hook sees the trainer after each step and once at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from pretrain.loop.evaluate import evaluate

if TYPE_CHECKING:
    from data_pipeline.read.loader import ValidationLoader
    from pretrain.loop.trainer import Trainer


class Hook(Protocol):
    def after_step(self, trainer: Trainer) -> None:
        """Called on every rank after optimizer step `trainer.step`, counted from 1."""

    def at_end(self, trainer: Trainer) -> None:
        """Called on every rank after the loop, whether the run is complete or interrupted."""


class Validation:
    """Loss and perplexity on held-out text every N steps and after the run's last step; skipped when interrupted."""

    def __init__(self, loader: ValidationLoader, every_steps: int) -> None:
        self.loader = loader
        self.every_steps = every_steps

    def after_step(self, trainer: Trainer) -> None:
        last = trainer.step == trainer.config.training.steps
        if not trainer.stopped and (last or (self.every_steps and trainer.step % self.every_steps == 0)):
            layout = trainer.layout
            result = evaluate(
                trainer.backend.eval_losses, self.loader, layout.device, layout.size("data"), trainer.agree_to_stop
            )
            if result is None:
                return
            perplexity = math.exp(min(result.loss, 700.0))
            trainer.metrics.write(trainer.step, {"validation/loss": result.loss, "validation/perplexity": perplexity})
            trainer.progress.say(f"step {trainer.step}: validation loss {result.loss:.4f}, perplexity {perplexity:,.2f}")

    def at_end(self, trainer: Trainer) -> None:
        """Do nothing: after an interruption the checkpoint comes first."""


class Checkpoints:
    """Save every N steps and at the end, then delete old checkpoints. The last hook, so that it saves what the others did."""

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
