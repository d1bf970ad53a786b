"""The training loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.loader import TrainLoader
from pretrain.backends.base import Backend
from pretrain.checkpoints.folder import CHECKPOINTS, complete_steps, step_folder
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook
from pretrain.loop.interruption import STOP_SIGNALS, Interruption
from pretrain.optim.schedule import learning_rate
from pretrain.report.metrics import MetricsWriter, Throughput, memory_gib
from pretrain.report.progress import Progress

H = TypeVar("H", bound=Hook)


class Trainer:
    """One run: steps until `training.steps` or an interruption, hooks after each step."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        backend: Backend,
        loader: TrainLoader,
        hooks: Sequence[Hook],
        first_step: int,
        interruption: Interruption | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.backend = backend
        self.loader = loader
        self.hooks = sorted(hooks, key=lambda hook: hook.priority)
        self.first_step = self.step = first_step
        self.metrics = MetricsWriter(Path(config.run.folder), config, layout, first_step)
        self.throughput = Throughput(config, layout)
        self.progress = Progress(config, layout, first_step)
        self.interruption = interruption or Interruption()
        self.stopped_by: int | None = None  # the signal that stops the run, the same on every rank
        self._all_ready: list[bool] = []  # of each hook, at the last reduction
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

    def close(self) -> None:
        for hook in self.hooks:
            hook.close()
        self.loader.close()
        self.progress.close()
        self.metrics.close()

    def advance(self) -> None:
        """One optimizer step, its report and the hooks."""
        started = time.perf_counter()
        rate = learning_rate(self.step, self.config)
        result = self.backend.train_step(self.loader.step(self.step), rate)
        loss, *terms = self._share(result.loss, *result.auxiliary.values())
        self.step += 1
        self._report(
            result.grad_norm, loss, dict(zip(result.auxiliary, terms, strict=True)), rate, time.perf_counter() - started
        )
        for hook, ready in zip(self.hooks, self._all_ready, strict=True):
            if ready:
                hook.when_all_ready(self)
        for hook in self.hooks:
            hook.after_step(self)

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

    def diverged(self, found: str, unusable: int | None = None) -> UserError:
        """The error that ends a run whose weights are of no use any more; `found` is what shows it. Every rank calls it.

        Those of step `unusable`, by default this one, are the first that nobody should resume from.
        """
        for hook in self.hooks:
            hook.at_failure(self)
        way = self._way_back(self.step if unusable is None else unusable)
        return UserError(f"step {self.step}: {found}: training diverged; {way}")

    def _way_back(self, unusable: int) -> str:
        """What to do with a run whose weights of step `unusable` and later are of no use."""
        folder = Path(self.config.run.folder)
        steps = complete_steps(folder / CHECKPOINTS)
        usable = [step for step in steps if step < unusable]
        anew = "start anew in another --run.folder with a lower optimizer.lr or a longer schedule.warmup_steps"
        if not usable:
            return anew
        newest, rate = step_folder(folder / CHECKPOINTS, usable[-1]), f"--optimizer.lr={self.config.optimizer.lr / 2:g}"
        again = f"--resume=auto {rate}"
        if usable != steps:  # --resume=auto would take a later one, and a folder that holds later ones refuses this one
            again = f"--resume=step:{usable[-1]} {rate}"
        return f"resume from {newest} with a lower rate, such as {again}, or {anew}"

    def _report(self, grad_norm: float, loss: float, terms: dict[str, float], rate: float, seconds: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            # The weights before this step gave the loss; with a finite one they are as good as any.
            unusable = self.step if math.isfinite(loss) else self.step - 1
            raise self.diverged(f"loss {loss}, gradient norm {grad_norm}", unusable)
        objective = loss - sum(terms.values())
        tokens_per_second, mfu = self.throughput.tokens_per_second(seconds), self.throughput.mfu(seconds)
        self.metrics.write(
            self.step,
            {
                "time": round(time.time(), 3),
                "loss": objective,
                **{f"loss/{name}": term for name, term in terms.items()},
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "tokens": self.step * self.throughput.tokens_per_step,
                "seconds": seconds,
                "tokens_per_second": tokens_per_second,
                "mfu": mfu,
                "memory_gib": memory_gib(self.layout.device),
            },
        )
        self.progress.step(self.step, objective, terms, rate, grad_norm, tokens_per_second, mfu)
