"""Loss over a fixed set of sequences, the same on every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data_pipeline.read.loader import Batch
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.objectives.base import WeightedSum, positive


@dataclass(frozen=True)
class Evaluation:
    """Sums over all evaluated labels of all ranks."""

    loss_sum: float  # Σ weight · loss, nats
    weight: float  # Σ weight: the number of labels where each counts once

    @property
    def loss(self) -> float:
        """The weighted mean, in nats per label."""
        return self.loss_sum / self.weight


@torch.no_grad()
def evaluate(
    loss: Callable[[Batch], WeightedSum],
    batches: Iterable[Batch],
    device: torch.device,
    data_size: int = 1,
    give_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The sum of `loss(batch)` over all batches of all ranks, in float64; ValueError on all ranks if no label has a weight.

    `batches` is this rank's share of `data_size` shares; the ranks of a tensor-parallel group pass the same share. Calls
    `give_up()` after each batch and returns None once it is true; it must return the same on all ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        sums += loss(batch).pair()
        if give_up():
            return None
    mean_loss, mean_weight = mean_over_ranks(sums.tolist(), device)
    return Evaluation(mean_loss * data_size, positive(mean_weight * data_size))
