"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.loader import Batch, Loader, NoBatchError
from pretrain.backends.base import Backend, StepResult
from pretrain.checkpoints.folder import CHECKPOINTS, complete_steps, step_folder
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook
from pretrain.loop.interruption import STOP_SIGNALS, Interruption
from pretrain.loop.parts import Parts
from pretrain.loop.skipping import Skipping
from pretrain.optim.schedule import learning_rate
from pretrain.report.metrics import MetricsWriter, Throughput, memory_gib
from pretrain.report.progress import Progress

H = TypeVar("H", bound=Hook)
ANEW = "start anew in another --run.folder"


class Trainer:
    """One run: steps until `training.steps` or an interruption, hooks after each step."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        backend: Backend,
        loader: Loader,
        hooks: Sequence[Hook],
        first_step: int,
        interruption: Interruption | None = None,
    ) -> None:
        """One of the `hooks` is a `Skipping`."""
        self.config = config
        self.layout = layout
        self.backend = backend
        self.loader = loader
        self.hooks = sorted(hooks, key=lambda hook: hook.priority)
        self.skipping = self.hook(Skipping)
        self.last = StepResult(math.nan, math.nan)  # what the last step reported, its losses averaged over ranks
        self.seconds = math.nan  # that it took
        self.first_step = self.step = first_step
        self.metrics = MetricsWriter(Path(config.run.folder), config, layout, first_step)
        self.throughput = Throughput(config, layout)
        self.progress = Progress(config, layout, first_step)
        self.interruption = interruption or Interruption()
        self.stopped_by: int | None = None  # the signal that stops the run, the same on every rank
        self._all_ready: list[bool] = []  # of each hook, at the last reduction
        self.parts = Parts(self)
        self.done = False  # set by a hook on every rank: end the loop after this step

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def run(self) -> int | None:
        """Train. Returns None if the loop is complete, else the signal that stopped it; a stopped run can be resumed."""
        self.agree_to_stop()  # a signal may have arrived while the parts were built
        for hook in self.hooks:
            hook.begin(self)
        while self.step < self.config.training.steps and not self.done and not self.stopped:
            self.advance()
        for hook in self.hooks:
            hook.at_end(self)
        return None if self.done or self.step == self.config.training.steps else self.stopped_by

    def hook(self, kind: type[H]) -> H:
        """This run's hook of a kind that it is known to have."""
        return next(hook for hook in self.hooks if isinstance(hook, kind))

    def close(self, waits: bool = True) -> None:
        """Give back what the run holds; `waits` for what its hooks still do, as after an error nobody should."""
        with ExitStack() as closing:
            for part in (self.metrics, self.progress, self.loader):
                closing.callback(part.close)
            for hook in self.hooks:
                closing.callback(hook.close, waits)

    def advance(self) -> None:
        """One optimizer step, its report and the hooks."""
        started = time.perf_counter()
        rate = learning_rate(self.step, self.config)
        result = self.backend.train_step(self._batches(), rate, self.skipping.accepts)
        loss, *terms = self._share(result.loss, *result.auxiliary.values())
        self.last = replace(result, loss=loss, auxiliary=dict(zip(result.auxiliary, terms, strict=True)))
        self.step += 1
        self.seconds = time.perf_counter() - started
        self._report(rate)
        for hook, ready in zip(self.hooks, self._all_ready, strict=True):
            if ready:
                hook.when_all_ready(self)
        for hook in self.hooks:
            hook.after_step(self)

    def _batches(self) -> list[Batch]:
        """Those of the next step. Where its text is missing on any rank, the steps before are saved, as at the end of a run."""
        try:
            return self.loader.step(self.step)
        except NoBatchError as error:
            try:
                for hook in self.hooks:
                    hook.at_end(self)
            except UserError as unsaved:
                raise UserError(f"{error}; {unsaved}") from error
            raise

    def agree_to_stop(self) -> bool:
        """True on every rank, from then on, once any rank has received a signal to stop. Every rank calls it."""
        self._share()
        return self.stopped

    def _share(self, *values: float) -> list[float]:
        """The values averaged over ranks.

        The same reduction tells all ranks which signals any rank received, and which hooks are ready on all ranks.
        """
        signals = [float(self.interruption.signal == number) for number in STOP_SIGNALS]
        averages = mean_over_ranks([*values, *signals, *(float(hook.ready()) for hook in self.hooks)], self.layout.device)
        shares = averages[len(values) :]
        received = [number for number, share in zip(STOP_SIGNALS, shares, strict=False) if share > 0]
        self._all_ready = [share == 1 for share in shares[len(STOP_SIGNALS) :]]
        if self.stopped_by is None and received:
            self.stopped_by = received[0]
        return averages[: len(values)]

    def diverged(self, found: str, *, unusable: int | None = None, in_a_row: int | None = None) -> UserError:
        """The error that ends a run whose weights are of no use any more; `found` is what shows it. Every rank calls it.

        Those of step `unusable`, by default this one, are the first that nobody should resume from.
        `in_a_row`: the last steps, so many, have been skipped. Then their samples can be at fault, and so can the weights from
        which they started, if they gave a loss that is not finite.
        """
        for hook in self.hooks:
            hook.at_failure(self)
        if in_a_row is None:
            way = self._way_back(self.step if unusable is None else unusable)
        else:
            before = self.step - in_a_row  # checkpoints of later steps hold no other weights
            way = f"{self._way_back(before + math.isfinite(self.last.loss))}, or {self._leave_out(before)}"
        return UserError(f"step {self.step}: {found}: training diverged; {way}")

    def _way_back(self, unusable: int) -> str:
        """What to do with a run whose weights of step `unusable` and later are of no use."""
        anew = f"{ANEW} with a lower optimizer.lr or a longer schedule.warmup_steps"
        found = self._again(unusable)
        if found is None:
            return anew
        newest, again = found
        rate = f"--optimizer.lr={self.config.optimizer.lr / 2:g}"
        return f"resume from {newest} with a lower rate, such as {again} {rate}, or {anew}"

    def _leave_out(self, step: int) -> str:
        """How to train on without the samples of the steps after `step`."""
        samples, found = self.skipping.samples(self.step, self.step - step), self._again(step + 1)
        again = f"{ANEW} with" if found is None else f"resume from {found[0]}, such as {found[1]}"
        wanted = f"--training.skip_samples='{sorted([*self.config.training.skip_samples, *samples])}'"
        return f"leave out the samples of these steps, {samples}: {again} {wanted}"

    def _again(self, before: int) -> tuple[Path, str] | None:
        """The newest checkpoint of a step below `before`, and the argument that resumes from it."""
        folder = Path(self.config.run.folder)
        steps = complete_steps(folder / CHECKPOINTS)
        usable = [step for step in steps if step < before]
        if not usable:
            return None
        newest = usable[-1]
        return step_folder(folder / CHECKPOINTS, newest), f"--resume={'auto' if newest == steps[-1] else f'step:{newest}'}"

    def _report(self, rate: float) -> None:
        loss, grad_norm, terms = self.last.loss, self.last.grad_norm, self.last.auxiliary
        objective = loss - sum(terms.values())
        tokens_per_second = self.throughput.tokens_per_second(self.seconds)
        mfu, hfu = self.throughput.mfu(self.seconds), self.throughput.hfu(self.seconds)
        self.metrics.write(
            self.step,
            {
                "time": round(time.time(), 3),
                "loss": objective,
                **{f"loss/{name}": term for name, term in terms.items()},
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens": self.step * self.throughput.tokens_per_step,
                "seconds": self.seconds,
                "tokens_per_second": tokens_per_second,
                "mfu": mfu,
                "hfu": hfu,
                "memory_gib": memory_gib(self.layout.device),
            },
        )
        self.progress.step(self.step, objective, terms, rate, grad_norm, tokens_per_second, mfu, hfu)
