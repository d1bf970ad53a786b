"""The objective of a decoder."""

from __future__ import annotations

from configs.schema import Config
from data_pipeline.read.loader import Batch
from pretrain.objectives.base import Examples, Objective


class NextToken(Objective):
    """Each token predicts the one after it; the loss is the cross-entropy.

    Where `data.packing` keeps documents apart, what follows the end of a document is no label: the first token of the next one,
    or what fills up a sample.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.end = config.model.end_of_document if config.data.keeps_documents_apart else None

    def examples(self, batch: Batch) -> Examples:
        weights = batch.weights
        if self.end is not None:
            inside_BS = (batch.tokens != self.end).float()
            weights = inside_BS if weights is None else weights * inside_BS
        return Examples(batch.tokens, batch.labels, weights)
