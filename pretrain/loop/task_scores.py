"""Scores of multiple-choice tasks while a model is trained: how often the likeliest choice is the right one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch

from data_pipeline.read.loader import Batch
from data_pipeline.read.task_file import Item, Task
from data_pipeline.read.task_loader import TaskLoader
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.loop.hooks import Hook, measures
from pretrain.loop.trainer import Trainer
from pretrain.objectives.base import WeightedSum


class TaskScores(Hook):
    """Accuracy of each task every N steps and after the run's last step; skipped when interrupted."""

    def __init__(self, tasks: Sequence[TaskLoader], every_steps: int) -> None:
        self.tasks, self.every_steps = tasks, every_steps

    def begin(self, trainer: Trainer) -> None:
        for loader in self.tasks:
            trainer.progress.say(f"task    {in_words(loader.task, trainer.config.data.sequence_length)}")

    def after_step(self, trainer: Trainer) -> None:
        if measures(trainer, self.every_steps):
            self.score(trainer)

    def score(self, trainer: Trainer) -> None:
        """Write and show the scores of the model as it is; nothing if a signal interrupts it."""
        layout, found = trainer.layout, dict[str, Mapping[str, float]]()
        for loader in self.tasks:
            logs = log_probabilities(
                trainer.backend.eval_loss, loader, layout.device, layout.size("data"), trainer.agree_to_stop
            )
            if logs is None:
                return
            if not all(map(math.isfinite, logs)):
                raise trainer.diverged(f"log-probabilities of the task {loader.task.name} that are not finite")
            found[loader.task.name] = scores(loader.task.items, logs)
        figures = {f"tasks/{name}/{figure}": value for name, of_task in found.items() for figure, value in of_task.items()}
        trainer.metrics.write(trainer.step, figures)
        for name, of_task in found.items():
            shown = ", ".join(f"{figure} {value:.4f}" for figure, value in of_task.items())
            trainer.progress.say(f"step {trainer.step}: task {name}: {shown}")


def in_words(task: Task, length: int) -> str:
    """How large a task is, what guessing gives, and what does not fit."""
    chance = math.fsum(1 / len(item.choices) for item in task.items) / len(task.items)
    cut = f"; {task.cut:,} longer than data.sequence_length ({length}) lose their beginning" if task.cut else ""
    return f"{task.name}: {len(task.items):,} questions, {len(task.rows):,} choices, guessing gives {chance:.4f}{cut}"


@torch.no_grad()
def log_probabilities(
    loss: Callable[[Batch], WeightedSum],
    loader: TaskLoader,
    device: torch.device,
    data_size: int = 1,
    give_up: Callable[[], bool] = lambda: False,
) -> list[float] | None:
    """The log-probability of each row's choice after its context, in nats; the same on all ranks.

    `loss` is an engine's `eval_loss`: a sum for each example. `give_up` as in `evaluate`.
    """
    rows = torch.zeros(len(loader.task.rows), dtype=torch.float64, device=device)
    for numbers, batch in loader:
        sums = loss(batch).loss
        rows[torch.tensor(numbers, dtype=torch.long, device=device)] = -sums[: len(numbers)]
        if give_up():
            return None
    # Each row is on the ranks of one data-parallel coordinate and 0 on the others.
    return [mean * data_size for mean in mean_over_ranks(rows.tolist(), device)]


def scores(items: Sequence[Item], logs: Sequence[float]) -> dict[str, float]:
    """lm-evaluation-harness's figures of these names, from the log-probabilities of all choices in order.

    `acc`: how often the right choice is the likeliest one. `acc_bytes`: how often it has the largest log-probability for each
    of its bytes, so that long choices are not at a disadvantage. Of equal ones the first counts.
    """
    ends = list(accumulate(len(item.choices) for item in items))
    right = {"acc": 0, "acc_bytes": 0}
    for item, end in zip(items, ends, strict=True):
        own = logs[end - len(item.choices) : end]
        for_each_byte = [log / len(choice.encode()) for log, choice in zip(own, item.choices, strict=True)]
        right["acc"] += own.index(max(own)) == item.answer
        right["acc_bytes"] += for_each_byte.index(max(for_each_byte)) == item.answer
    return {name: count / len(items) for name, count in right.items()}
