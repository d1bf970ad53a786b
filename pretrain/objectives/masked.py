"""Masked language modelling, the objective of models that see both sides of a token."""

from __future__ import annotations

import numpy as np
import torch

from configs.schema import Config
from data_pipeline.corrupt.draws import draws
from data_pipeline.corrupt.masking import Masking
from data_pipeline.read.loader import Batch
from pretrain.objectives.base import Examples, Objective
from pretrain.objectives.registry import vocabulary_of


class MaskedTokens(Objective):
    """Some tokens of a sample are hidden; the loss is the cross-entropy of these.

    The weights of a batch are those of its samples: all labels of a sample have the same.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mask = Masking(config.training.masked, vocabulary_of(config))

    def examples(self, batch: Batch) -> Examples:
        assert batch.seeds is not None
        samples = zip(batch.tokens.numpy(), batch.seeds.tolist(), strict=True)
        masked = [self.mask(tokens, draws(seed)) for tokens, seed in samples]
        inputs_BS, chosen_BS = (torch.from_numpy(np.stack(part)) for part in zip(*masked, strict=True))
        weights_BS = chosen_BS.float()
        return Examples(inputs_BS, batch.tokens, weights_BS if batch.weights is None else weights_BS * batch.weights)
