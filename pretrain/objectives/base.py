"""What training minimises and validation reports: a weighted mean of losses over all labels of all ranks.

An objective turns batches into examples, and what the model's last layer gives into a weighted sum of losses. Every engine and
every evaluation goes through it; none computes a loss by itself. A weight of 0 leaves a label out. The mean is over the whole
step, Σ weight · loss / Σ weight over all micro-batches and ranks, however their weights are spread. Engines average what they
are given over micro-batches and data-parallel ranks, so each micro-batch gives its weighted sum over the mean weight of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.auxiliary import AuxiliaryLosses, factor_of
from model.layers import Layers
from pretrain.distributed.collectives import mean_over_ranks

Z_LOSS = "z_loss"  # the name of its term


@dataclass(frozen=True)
class Examples:
    """A micro-batch as an objective puts it to a model.

    `inputs`: what the model's first layer is given, a tensor or a tuple of tensors. `labels`: what losses are taken against,
    (B, S). `weights`: how much each label counts, (B, S); None: each counts once.
    """

    inputs: Any
    labels: Tensor
    weights: Tensor | None = None

    @property
    def weight(self) -> float:
        """Σ weight over the labels."""
        return float(self.labels.numel() if self.weights is None else self.weights.double().sum())

    def to(self, device: torch.device) -> Examples:
        """The same on a device; what is in pinned memory is copied while the device computes."""

        def moved(x: Any) -> Any:
            return x.to(device, non_blocking=True)

        inputs = tuple(map(moved, self.inputs)) if isinstance(self.inputs, tuple) else moved(self.inputs)
        return Examples(inputs, moved(self.labels), None if self.weights is None else moved(self.weights))


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · loss and Σ weight over the labels of a micro-batch, or in an evaluation over those of each example in it."""

    loss: Tensor  # nats; a scalar, or (B,) in an evaluation
    weight: Tensor | float
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # weighted sums that are minimised, too, by their metrics' names
    auxiliary: AuxiliaryLosses | None = None  # where terms go

    def over(self, mean_weight: float) -> Tensor:
        """What a micro-batch adds to the mean of a step whose micro-batches weigh `mean_weight` on average.

        Its gradient is not finite if it is not itself, so that the gradient norm tells all ranks.
        """
        share: Tensor = _Contagious.apply(self.loss / mean_weight)
        for name, term in self.terms.items():
            assert self.auxiliary is not None
            share = self.auxiliary.add(share, name, term / mean_weight)
        return share

    def pair(self) -> Tensor:
        """Loss and weight as one float64 tensor, (2,) or (2, B)."""
        return torch.stack(
            [torch.as_tensor(part, dtype=torch.float64, device=self.loss.device) for part in (self.loss, self.weight)]
        )


class _Contagious(torch.autograd.Function):
    """The identity. Its gradient is NaN where its value is not finite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        ctx.factor = factor_of(loss)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.factor


def weighted_sum(losses_BS: Tensor, weights_BS: Tensor | None) -> WeightedSum:
    """The sum over labels of (B, S) losses; every label counts once where there are no weights.

    Where no gradient is wanted, a sum for each example, (B,), in float64, so that an evaluation is exact and can tell examples
    apart; else one for all, in the type of the losses.
    """
    if not torch.is_grad_enabled():
        losses_BS = losses_BS.double()
        weights_BS = torch.ones_like(losses_BS) if weights_BS is None else weights_BS.to(losses_BS)
        return WeightedSum((losses_BS * weights_BS).sum(dim=1), weights_BS.sum(dim=1))
    if weights_BS is None:
        return WeightedSum(losses_BS.sum(), float(losses_BS.numel()))
    weights_BS = weights_BS.to(losses_BS)
    return WeightedSum((losses_BS * weights_BS).sum(), weights_BS.sum())


def mean_weight(micro_batches: Sequence[Examples], device: torch.device) -> float:
    """Σ weight of one micro-batch on average over a step's micro-batches on all ranks; every rank calls it.

    Always one reduction of one number: a rank cannot know whether the batches of other ranks have weights.
    """
    total = sum(examples.weight for examples in micro_batches)
    (mean,) = mean_over_ranks([total / len(micro_batches)], device)
    return positive(mean)


def positive(weight: float) -> float:
    """`weight`, by which a sum of losses is to be divided; ValueError if no label counts. All ranks have the same."""
    if not weight > 0:
        raise ValueError(f"the labels have a weight of {weight} in all; some must count")
    return weight


class Objective:
    """What a model learns. Each objective is a subclass in a file of its own; registry.py says which models learn it."""

    def __init__(self, config: Config) -> None:
        """`config` is resolved. Every rank makes its own."""
        self.z_loss = config.training.z_loss

    def examples(self, batch: Batch) -> Examples:
        """What the model is to predict of a batch, and from what; on the CPU, the same on all ranks that share the batch.

        Weights, too, are known here: the sum over a step's labels is taken before its first forward pass.
        """
        raise NotImplementedError

    def loss(self, own: Tensor, labels_BS: Tensor, weights_BS: Tensor | None, layers: Layers) -> WeightedSum:
        """The weighted sum of the losses of some examples; its weight is `Examples.weight`.

        `own` is what the model's last layer gives: of a language model this rank's logits, (S, B, V), a shard of the vocabulary
        under tensor parallelism. `layers`, which made the model, does what needs the other shards; each tensor-parallel rank
        returns the same sum. Runs with gradient in training, and without one in evaluation, which gives a sum for each example.
        Keep no reference to `own`.

        By default the cross-entropy of each label, and in training the term `training.z_loss` (PaLM, arXiv 2204.02311).
        """
        if not self.z_loss or not torch.is_grad_enabled():
            return weighted_sum(layers.losses(own, labels_BS), weights_BS)
        squares = weighted_sum(layers.normalizers(own).square(), weights_BS)
        total = weighted_sum(layers.losses(own, labels_BS), weights_BS)
        return replace(total, terms={Z_LOSS: self.z_loss * squares.loss}, auxiliary=layers.auxiliary)

    def text_bytes(self, batch: Batch, bytes_of_token_V: Tensor) -> float:
        """Σ weight · bytes of text that each label of a batch stands for, given those of each token id."""
        examples = self.examples(batch)
        return float(weighted_sum(bytes_of_token_V[examples.labels].double(), examples.weights).loss.sum())

    def loss_of(self, model: Callable[[Any], Tensor], examples: Examples, layers: Layers, device: torch.device) -> WeightedSum:
        """`loss` by a model that runs from end to end on `device`. Pipelines call `loss` on their last stage."""
        examples = examples.to(device)
        return self.loss(model(examples.inputs), examples.labels, examples.weights, layers)  # no name keeps the logits alive
