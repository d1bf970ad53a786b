"""Loss over a fixed set of sequences, the same on every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data_pipeline.read.loader import Batch
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.objectives import weighted_sum


@dataclass(frozen=True)
class Evaluation:
    """Sums over all evaluated label tokens of all ranks."""

    loss_sum: float  # nats
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens


def evaluate(
    losses: Callable[[Batch], torch.Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    data_size: int = 1,
    give_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The weighted sum of `losses(batch)`, (B, S) in nats, over all batches of all ranks.

    `batches` is this rank's share of `data_size` shares; the ranks of a tensor-parallel group pass the same share. Calls
    `give_up()` after each batch and returns None once it is true; it must return the same on all ranks.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0.0
    for batch in batches:
        total = weighted_sum(losses(batch).double(), batch.weights)
        loss_sum += total.loss
        tokens += float(total.weight)
        if give_up():
            return None
    mean_loss, mean_tokens = mean_over_ranks([float(loss_sum), tokens], device)
    return Evaluation(mean_loss * data_size, round(mean_tokens * data_size))
