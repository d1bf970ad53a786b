"""Loss and bits per byte over a fixed set of sequences, the same on every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    text_bytes: float = 0.0  # Σ weight · UTF-8 bytes of text that the label stands for; 0 where nobody counted them

    @property
    def loss(self) -> float:
        """The weighted mean, in nats per label."""
        return self.loss_sum / self.weight

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; finite, because JSON has no infinity."""
        return _exponential(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the evaluated text, so that tokenizers can be compared; None without text."""
        return self.loss_sum / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def figures(self) -> dict[str, float | None]:
        """What is reported, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def mean_of(evaluations: Sequence[Evaluation]) -> dict[str, float | None]:
    """The figures of several texts together, each of which counts the same: the mean loss, the perplexity of that loss, and
    the mean of bits per byte, None if one of them has none.
    """
    loss = math.fsum(evaluation.loss for evaluation in evaluations) / len(evaluations)
    bits = [known for evaluation in evaluations if (known := evaluation.bits_per_byte) is not None]
    mean_bits = math.fsum(bits) / len(bits) if len(bits) == len(evaluations) else None
    return {"loss": loss, "perplexity": _exponential(loss), "bits_per_byte": mean_bits}


def _exponential(loss: float) -> float:
    return math.exp(min(loss, 700.0))


@torch.no_grad()
def evaluate(
    loss: Callable[[Batch], WeightedSum],
    batches: Iterable[Batch],
    device: torch.device,
    data_size: int = 1,
    give_up: Callable[[], bool] = lambda: False,
    text_bytes: Callable[[Batch], float] = lambda batch: 0.0,
) -> Evaluation | None:
    """The sums of `loss(batch)` and `text_bytes(batch)` over all batches of all ranks, in float64.

    ValueError on all ranks if no label has a weight.

    `batches` is this rank's share of `data_size` shares; the ranks of a tensor-parallel group pass the same share. Calls
    `give_up()` after each batch and returns None once it is true; it must return the same on all ranks.
    """
    sums, size = torch.zeros(2, dtype=torch.float64, device=device), 0.0
    for batch in batches:
        sums += loss(batch).pair().reshape(2, -1).sum(dim=1)  # of all its examples
        size += text_bytes(batch)
        if give_up():
            return None
    mean_loss, mean_weight, mean_size = mean_over_ranks([*sums.tolist(), size], device)
    return Evaluation(mean_loss * data_size, positive(mean_weight * data_size), mean_size * data_size)
