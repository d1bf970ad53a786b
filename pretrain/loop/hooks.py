"""What happens between steps: validation, checkpoints, and whatever else a run adds to its loop as a hook."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from configs.errors import UserError
from data_pipeline.read.sets import UNNAMED
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import NotFiniteError, State
from pretrain.distributed.collectives import OtherRankError
from pretrain.loop.evaluate import Evaluation, evaluate, mean_of

if TYPE_CHECKING:
    from data_pipeline.read.loader import Batch, ValidationLoader
    from pretrain.checkpoints.resume import Read, Start
    from pretrain.loop.trainer import Trainer


class Hook:
    """A part of a run that acts between steps. Subclasses replace what they need; all ranks call each method together.

    Hooks act in the order of `priority`, lowest first; those of one priority act in the order in which they were given. Those
    with a state act before `Checkpoints`, so that it saves what they know of the step.
    """

    priority: ClassVar[int] = 50

    def begin(self, trainer: Trainer) -> None:
        """Called once, before the first step that this process takes."""

    def ready(self) -> bool:
        """Whether this rank is ready for `when_all_ready`. Once true, it stays true until then."""
        return False

    def when_all_ready(self, trainer: Trainer) -> None:
        """Called after the first step at which all ranks are ready, before `after_step`. To learn it takes no collective."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after optimizer step `trainer.step`, counted from 1. To end the loop, set `trainer.done` on every rank."""

    def at_end(self, trainer: Trainer) -> None:
        """Called after the loop, whether the run is complete, interrupted, or without text for its next step."""

    def at_failure(self, trainer: Trainer) -> None:
        """Called on all ranks before they raise the same UserError, which ends the loop."""

    def close(self, waits: bool) -> None:
        """Called once at the very end: give back what would outlive the run. No collectives here.

        After an error or a second Ctrl-C `waits` is false: others have to hear of it at once.
        """

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

    def state(self) -> State:
        """Tensors and scalars of the hook's own that a checkpoint keeps, sharded as it likes; under kinds of its own.

        No collectives here, either.
        """
        return State([], {})

    def load_state(self, start: Start, read: Read) -> str | None:
        """Let `read` fill `state` from a checkpoint, whatever layout wrote it; a line for the user, as `load`.

        The engine has been loaded. `start` says what the checkpoint holds. All ranks call `read` alike.
        """
        return None


def measures(trainer: Trainer, every_steps: int) -> bool:
    """Whether a model is measured after this step: every N steps and after the run's last one, but not once it is stopped."""
    last = trainer.step == trainer.config.training.steps
    return not trainer.stopped and (last or (every_steps > 0 and trainer.step % every_steps == 0))


class Validation(Hook):
    """Figures of held-out text every N steps and after the run's last step; skipped when interrupted.

    Each named set has its own, and what stands for all of them is their mean, in which each set counts the same.
    """

    def __init__(self, sets: Mapping[str, ValidationLoader], every_steps: int, text_bytes: Callable[[Batch], float]) -> None:
        """`sets` as `validation_sets` names them. `text_bytes`: how many bytes of text the labels of a batch stand for."""
        self.sets = sets
        self.every_steps = every_steps
        self.text_bytes = text_bytes

    @property
    def samples(self) -> int:
        """Those of all sets."""
        return sum(loader.samples for loader in self.sets.values())

    def after_step(self, trainer: Trainer) -> None:
        if measures(trainer, self.every_steps):
            self.validate(trainer)

    def validate(self, trainer: Trainer) -> None:
        """Write and show loss, perplexity and bits per byte of the model as it is; nothing if a signal interrupts it."""
        layout, results = trainer.layout, dict[str, Evaluation]()
        for name, loader in self.sets.items():
            result = evaluate(
                trainer.backend.eval_loss, loader, layout.device, layout.size("data"), trainer.agree_to_stop, self.text_bytes
            )
            if result is None:
                return
            if not math.isfinite(result.loss):
                of_set = "" if name == UNNAMED else f" of {name}"
                raise trainer.diverged(f"validation loss{of_set} {result.loss}")
            results[name] = result
        self._report(trainer, results)

    def _report(self, trainer: Trainer, results: Mapping[str, Evaluation]) -> None:
        named = {name: result.figures for name, result in results.items() if name != UNNAMED}
        mean, lines = mean_of(list(results.values())), dict[str, float | None]()
        for name, figures in named.items():
            of_set = {**figures, "samples": self.sets[name].samples}
            lines |= {f"validation/{name}/{figure}": value for figure, value in of_set.items()}
            trainer.progress.say(f"step {trainer.step}: validation of {name}: {in_words(figures)}")
        lines |= {f"validation/{figure}": value for figure, value in {**mean, "samples": self.samples}.items()}
        trainer.metrics.write(trainer.step, lines)
        if len(named) != 1:  # that of one is said
            of_sets = f"; the mean of {len(named)} sets" if named else ""
            trainer.progress.say(f"step {trainer.step}: validation {in_words(mean)}{of_sets}")


def in_words(figures: Mapping[str, float | None]) -> str:
    """An evaluation's figures in a line."""
    bits = figures["bits_per_byte"]
    in_bits = "" if bits is None else f", {bits:.4f} bits per byte"
    return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:,.2f}{in_bits}"


class Checkpoints(Hook):
    """Save every N steps and at the end. Training goes on while a checkpoint is written, and if one cannot be."""

    priority = 90  # after all hooks whose state it saves

    def __init__(self, saver: Saver, every_steps: int) -> None:
        self.saver = saver
        self.every_steps = every_steps
        self.begun_step = 0  # of the newest checkpoint
        self.saved_step: int | None = None  # of the newest one that is complete

    def begin(self, trainer: Trainer) -> None:
        self.saver.clear_old()  # a process that was killed may have saved its last checkpoint, but not deleted an old one

    def ready(self) -> bool:
        return self.saver.written

    def when_all_ready(self, trainer: Trainer) -> None:
        self._finish(trainer)

    def after_step(self, trainer: Trainer) -> None:
        ends = trainer.stopped or trainer.done or trainer.step == trainer.config.training.steps
        if ends or not self.every_steps or trainer.step % self.every_steps:
            return
        self._finish(trainer)  # one at a time
        try:
            self._begin(trainer, waits=not self.saver.asynchronous)
        except OtherRankError:
            raise
        except UserError as error:
            self._go_on(trainer, error)
        if not self.saver.asynchronous:
            self._finish(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """UserError if the last step's state cannot be saved."""
        self._finish(trainer)
        if trainer.step > trainer.first_step and self.saved_step != trainer.step:
            self.save_now(trainer)

    def at_failure(self, trainer: Trainer) -> None:
        with suppress(UserError):  # another one is about to be raised
            self._finish(trainer)

    def close(self, waits: bool) -> None:
        self.saver.close(waits)  # its thread may still delete an old checkpoint, and would end with the process

    def save_now(self, trainer: Trainer) -> None:
        """Save the state as it is, and wait for it. UserError if that is impossible."""
        self._begin(trainer, waits=True)
        try:
            self._put_in_place(trainer)
        except NotFiniteError as error:
            raise self._diverged(trainer, error) from None

    def _begin(self, trainer: Trainer, waits: bool) -> None:
        def write_hooks(unfinished: Path) -> list[Path]:
            return [path for hook in trainer.hooks for path in hook.save(unfinished)]

        self.begun_step = trainer.step
        state = State.joined([trainer.backend.state(), *(hook.state() for hook in trainer.hooks)])
        self.saver.begin(trainer.step, state, write_hooks, waits)

    def _finish(self, trainer: Trainer) -> None:
        if self.saver.pending is None:
            return
        try:
            self._put_in_place(trainer)
        except NotFiniteError as error:
            raise self._diverged(trainer, error) from None
        except OtherRankError:
            raise
        except UserError as error:
            self._go_on(trainer, error)

    def _put_in_place(self, trainer: Trainer) -> None:
        folder = self.saver.finish()
        self.saved_step = self.begun_step
        trainer.progress.say(f"step {self.begun_step}: checkpoint {folder}")
        self.saver.clear_old()

    def _diverged(self, trainer: Trainer, error: NotFiniteError) -> UserError:
        return trainer.diverged(f"the weights or the optimizer's state are not finite ({error})", unusable=self.begun_step)

    def _go_on(self, trainer: Trainer, error: UserError) -> None:
        if trainer.layout.is_main:
            print(f"warning: {error}; training goes on, and the next checkpoint tries again", file=sys.stderr, flush=True)
