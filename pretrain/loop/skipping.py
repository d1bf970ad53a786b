"""Steps that are skipped: with a loss or gradient that is not finite, or one far above those of the last steps.

A skipped step changes neither weights nor the optimizer's state. The number of the step, and with it the learning rate, the
order of samples and what happens every N steps, goes on.

The rule for spikes is that of OLMo-core's `SkipStepOptimizer`: loss and gradient norm are compared with mean and standard
deviation of the last 128 steps, from 64 on. Two things differ: only values above the mean are spikes, and values that are not
finite do not count among the last ones, where they would make every later comparison false. Spikes do count, so a level that
stays high is accepted after a few steps.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat, NonNegativeInt

from configs.durable import write_text
from configs.schema import Config
from data_pipeline.mix.order import SampleOrder
from pretrain.checkpoints.folder import read_json
from pretrain.distributed.collectives import broadcast_object, mean_over_ranks, together
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

FILE = "skipping.json"  # in a checkpoint
WINDOW = 128  # steps that a spike is compared with
FEWEST = WINDOW // 2  # with fewer there are no spikes
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Kept:
    """Content of skipping.json. JSON keeps every bit of a float64."""

    skipped: NonNegativeInt
    in_a_row: NonNegativeInt
    losses: Annotated[list[FiniteFloat], Field(max_length=WINDOW)]
    grad_norms: Annotated[list[FiniteFloat], Field(max_length=WINDOW)]


class Skipping(Hook):
    """Decides on each step before the optimizer takes it; counts and reports those that are skipped."""

    priority = 5  # before the hooks that look at the step

    def __init__(self, config: Config, layout: Layout) -> None:
        self.limit, self.sigma = config.training.skip.nonfinite, config.training.skip.spike_sigma
        self.layout = layout
        self.order, self.batch = SampleOrder(config.training.skip_samples), config.training.global_batch_size
        self.losses, self.grad_norms = deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW)  # of the last watched steps
        self.skipped = 0  # steps of the run so far
        self.in_a_row = 0  # steps up to now whose loss or gradient norm was not finite
        self.found = ""  # what is wrong with the step that `accepts` was last asked about

    def accepts(self, grad_norm: float, own_loss: Callable[[], float]) -> bool:
        """Whether the running step is taken; `pretrain.backends.base.Accepts`. Every rank asks once a step."""
        self.found = ""
        if not math.isfinite(grad_norm):
            self.found = NOT_FINITE
        elif self.sigma is not None:
            # The same numbers on all ranks, to the bit: replicas of a model may differ in the last one.
            loss, grad_norm = mean_over_ranks([own_loss(), grad_norm], self.layout.device)
            figures = {"loss": (loss, self.losses), "gradient norm": (grad_norm, self.grad_norms)}
            self.found = " and ".join(name for name, (value, last) in figures.items() if is_spike(value, last, self.sigma))
            for value, last in figures.values():
                last.append(value)
        return not self.found

    def after_step(self, trainer: Trainer) -> None:
        """Report a step that was skipped. UserError on every rank if too many in a row are not finite."""
        loss, grad_norm, skipped = trainer.last.loss, trainer.last.grad_norm, trainer.last.skipped
        computed = math.isfinite(loss) and math.isfinite(grad_norm)
        self.in_a_row = 0 if computed else self.in_a_row + 1
        if skipped:
            self.skipped += 1
            samples = self.samples(trainer.step, 1)
            notes = {"skipped_for": self.found, "skipped_samples": samples}
            trainer.metrics.write(trainer.step, {"skipped": self.skipped}, notes)
            found = self.found if self.found == NOT_FINITE else f"a spike of the {self.found}"
            trainer.progress.say(
                f"step {trainer.step}: skipped, {found}: loss {loss:.4g}, gradient norm {grad_norm:.4g}; samples {samples}"
            )
        if not computed and (self.in_a_row > self.limit or not skipped):
            row = f", not finite in {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
            raise trainer.diverged(f"loss {loss}, gradient norm {grad_norm}{row}", in_a_row=self.in_a_row)

    def samples(self, step: int, steps: int) -> list[list[int]]:
        """The samples of the last `steps` steps up to `step`, as `training.skip_samples` has them."""
        return self.order.numbers((step - steps) * self.batch, step * self.batch)

    def save(self, folder: Path) -> list[Path]:
        if not self.layout.is_main:
            return []
        kept = Kept(self.skipped, self.in_a_row, list(self.losses), list(self.grad_norms))
        write_text(folder / FILE, json.dumps(asdict(kept)))
        return [folder / FILE]

    def load(self, folder: Path) -> str | None:
        found: list[Kept] = []

        def read() -> None:
            if (folder / FILE).exists():  # not in a checkpoint that one process wrote
                found.append(read_json(folder / FILE, Kept))

        together(read, main_only=True)
        for kept in broadcast_object(found):
            self._restore(kept)
        return None

    def _restore(self, kept: Kept) -> None:
        self.skipped, self.in_a_row = kept.skipped, kept.in_a_row
        if self.sigma is not None:  # without, they would be those of long ago when a later run watches again
            self.losses.extend(kept.losses)
            self.grad_norms.extend(kept.grad_norms)


def is_spike(value: float, last: Sequence[float], sigma: float) -> bool:
    """Whether `value` is more than `sigma` standard deviations above the mean of the `last` ones."""
    if len(last) < FEWEST:
        return False
    # Exactly rounded sums: ranks on other processors must come to the same result.
    mean = math.fsum(last) / len(last)
    variance = math.fsum((other - mean) ** 2 for other in last) / (len(last) - 1)
    return value > mean + sigma * math.sqrt(variance)
