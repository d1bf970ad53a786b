"""The parts of a step: which methods each consists of, and how others can watch their calls while they have a reason to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from pretrain.backends.base import Timed
from pretrain.loop.streaming import SharedBatches
from pretrain.report.step_parts import COMMUNICATION, ENGINE, LOADER, OURS, OUTPUT

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

Watcher = Callable[[Timed], AbstractContextManager[object]]  # entered around each call


def timed_methods(trainer: Trainer) -> Iterator[Timed]:
    """The methods of this rank's step, whose calls nest: the engine's, and what surrounds them."""
    loader = trainer.loader
    yield Timed(loader, "step", LOADER, waits=isinstance(loader, SharedBatches))
    if isinstance(loader, SharedBatches):
        yield Timed(loader.own, "step", LOADER, waits=False)
    yield Timed(trainer, "_report", OURS, waits=False)
    yield Timed(trainer.backend, "train_step", ENGINE, waits=True)
    yield Timed(trainer.backend.layers, "own_logits", OUTPUT, waits=trainer.layout.size("tensor") > 1)
    yield from trainer.backend.timed()
    if trainer.layout.world_size > 1:
        yield Timed(dist.Work, "wait", COMMUNICATION, waits=True)


class Parts:
    """Lets watchers see the calls of a step's parts. Without watchers the methods are what they are without this."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._watchers: list[Watcher] = []
        self._undo = ExitStack()

    def watch(self, watcher: Watcher) -> None:
        """From now on; not to be called during a step."""
        if not self._watchers:
            for timed in timed_methods(self._trainer):
                self._replace(timed)
        self._watchers.append(watcher)

    def leave(self, watcher: Watcher) -> None:
        """A watcher that sees no more; not to be called during a step."""
        self._watchers.remove(watcher)
        if not self._watchers:
            self._undo.close()

    def _replace(self, timed: Timed) -> None:
        holder, method, watchers = timed.holder, getattr(timed.holder, timed.method), self._watchers

        def watched(*arguments: Any, **options: Any) -> Any:
            with ExitStack() as entered:
                for watcher in watchers:
                    entered.enter_context(watcher(timed))
                return method(*arguments, **options)

        of_its_own = vars(holder).get(timed.method)
        setattr(holder, timed.method, watched)
        if of_its_own is None:
            self._undo.callback(delattr, holder, timed.method)
        else:  # an engine has replaced it, or it is a class
            self._undo.callback(setattr, holder, timed.method, of_its_own)
