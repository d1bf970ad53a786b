"""What a run has taken of each source of its mixture, in its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from data_pipeline.mix.plan import Plan
from pretrain.loop.hooks import Hook

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer


class Shares(Hook):
    """Writes share and epochs of each source in all steps so far."""

    priority = 20

    def __init__(self, config: Config) -> None:
        """`config` is resolved."""
        self.plan, self.every = Plan.of(config.data, config.training), config.logging.every_steps

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.config.training.steps:
            uses = self.plan.usage(trainer.step)
            shares = {f"data/share/{use.label}": use.share for use in uses}
            trainer.metrics.write(trainer.step, shares | {f"data/epochs/{use.label}": use.epochs for use in uses})
