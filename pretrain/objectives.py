"""What training minimises and validation reports: a weighted mean of losses over all tokens of all ranks.

Every mean and every count of tokens is taken here. A batch may weight its labels (`Batch.weights`): 0 leaves a token out. The
mean is over the whole step, Σ weight · loss / Σ weight over all micro-batches and ranks, however their weights are spread.
Engines average what they are given over micro-batches and data-parallel ranks, so each micro-batch gives its weighted sum over
the mean weight of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.schema import ModelConfig
from data_pipeline.read.loader import Batch
from pretrain.distributed.collectives import mean_over_ranks


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · loss and Σ weight over some labels."""

    loss: Tensor  # scalar
    weight: Tensor | float

    def over(self, mean_weight: float) -> Tensor:
        """What a micro-batch adds to the mean of a step whose micro-batches weigh `mean_weight` on average."""
        return self.loss / mean_weight


def weighted_sum(losses_BS: Tensor, weights_BS: Tensor | None) -> WeightedSum:
    """The sum over labels of (B, S) losses; every label counts once where there are no weights."""
    if weights_BS is None:
        return WeightedSum(losses_BS.sum(), float(losses_BS.numel()))
    weights_BS = weights_BS.to(losses_BS)
    return WeightedSum((losses_BS * weights_BS).sum(dim=1).sum(), weights_BS.sum())


def mean_weight(micro_batches: Sequence[Batch], device: torch.device) -> float:
    """Σ weight of one micro-batch on average over a step's micro-batches on all ranks; every rank calls it.

    No communication where no batch has weights: a loader gives them to all batches of all ranks or to none.
    """
    if all(batch.weights is None for batch in micro_batches):
        return float(micro_batches[0].labels.numel())
    total = sum(float(batch.weights.sum()) for batch in micro_batches if batch.weights is not None)
    (mean,) = mean_over_ranks([total / len(micro_batches)], device)
    if mean <= 0:
        raise ValueError("no label of this step has a weight above 0")
    return mean


class Objective(Protocol):
    """What a model learns: how a batch becomes the losses of its labels. Engines and evaluation know nothing else of it."""

    def losses(self, model: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
        """The loss of each label, (B, S) in nats, by an unsharded or sharded model that runs from end to end."""

    def stage_inputs(self, batch: Batch) -> tuple[Any, Any]:
        """For pipelines: what the first stage is given, and what the last stage's losses are taken against."""


class NextToken:
    """Each token predicts the one after it."""

    def losses(self, model: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
        losses_BS: Tensor = model(batch.tokens.to(device), batch.labels.to(device))
        return losses_BS

    def stage_inputs(self, batch: Batch) -> tuple[Any, Any]:
        return batch.tokens, batch.labels


_OF_KIND: dict[str, Callable[[], Objective]] = {"decoder": NextToken}


def objective_of(model: ModelConfig) -> Objective:
    """What a model of this `model.kind` learns."""
    return _OF_KIND[model.kind]()
