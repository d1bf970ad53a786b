"""Loss over a fixed set of sequences, the same on every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data_pipeline.read.loader import WeightedBatch
from pretrain.distributed.parallel import mean_over_ranks

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
    token_losses: TokenLosses,
    batches: Iterable[WeightedBatch],
    device: torch.device,
    data_size: int = 1,
    give_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Sum `token_losses(tokens, labels)` of every batch; sequences of weight 0 only keep the ranks in step.

    The batches are one of `data_size` shares; ranks of a tensor-parallel group have the same one.
    None as soon as `give_up()`, asked after each batch, is true; it must be so on all ranks or on none.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0.0
    for batch in batches:
        weights = batch.weights.to(device).double()
        losses_BS = token_losses(batch.tokens, batch.labels)
        loss_sum += (losses_BS.double().sum(dim=1) * weights).sum()
        tokens += float(batch.weights.sum()) * batch.labels.shape[1]
        if give_up():
            return None
    mean_loss, mean_tokens = mean_over_ranks([float(loss_sum), tokens], device)
    return Evaluation(mean_loss * data_size, round(mean_tokens * data_size))
