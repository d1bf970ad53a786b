"""Span corruption for a causal model: a text with sentinels, and after it what they stand for."""

from __future__ import annotations

import numpy as np
import torch

from configs.schema import Config
from data_pipeline.corrupt.draws import draws
from data_pipeline.corrupt.spans import SpanCorruption
from data_pipeline.read.loader import Batch
from data_pipeline.stream.text import end_of_document
from pretrain.objectives.base import Examples, Objective
from pretrain.objectives.registry import vocabulary_of


class Spans(Objective):
    """A row is the inputs of T5, then its targets and an end of document; the loss is that of the targets and the end.

    The weights of a batch are those of its samples: all labels of a sample have the same.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        special = vocabulary_of(config).special
        self.corruption = SpanCorruption(config.training.spans, config.data.sequence_length, special)
        self.end = end_of_document(config.data)

    def examples(self, batch: Batch) -> Examples:
        assert batch.seeds is not None
        samples = zip(batch.tokens.numpy(), batch.seeds.tolist(), strict=True)
        pairs = [self.corruption(tokens, draws(seed)) for tokens, seed in samples]
        rows_BT = torch.from_numpy(np.stack([np.concatenate([*pair, [self.end]]) for pair in pairs]))
        labels_BS = rows_BT[:, 1:].contiguous()
        weights_BS = torch.zeros(labels_BS.shape)
        weights_BS[:, len(pairs[0][0]) - 1 :] = 1
        if batch.weights is not None:
            weights_BS *= batch.weights[:, :1]
        return Examples(rows_BT[:, :-1].contiguous(), labels_BS, weights_BS)
