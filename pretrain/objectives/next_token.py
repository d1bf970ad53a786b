"""The objective of a decoder."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.read.loader import Batch
from model.layers import Layers
from pretrain.objectives.base import Examples, Objective, WeightedSum, weighted_sum


class NextToken(Objective):
    """Each token predicts the one after it; the loss is the cross-entropy."""

    def examples(self, batch: Batch) -> Examples:
        return Examples(batch.tokens, batch.labels, batch.weights)

    def loss(self, own: Tensor, labels_BS: Tensor, weights_BS: Tensor | None, layers: Layers) -> WeightedSum:
        return weighted_sum(layers.losses(own, labels_BS), weights_BS)
