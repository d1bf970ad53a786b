"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from configs.schema import OptimizerConfig
from pretrain.optim.groups import ParameterGroup


class AdamW:
    """The Recipe of `optimizer.kind: adamw`."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        """Matrices decay; norms, biases and head embeddings do not."""
        decayed = tuple(name for name, count in dimensions.items() if _decays(name, count))
        spared = tuple(name for name, count in dimensions.items() if not _decays(name, count))
        return [
            ParameterGroup("decayed", decayed, {"weight_decay": config.weight_decay}),
            ParameterGroup("spared", spared, {"weight_decay": 0.0}),
        ]

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )


def _decays(name: str, dimensions: int) -> bool:
    owner = name.rpartition(".")[0]
    of_heads = owner.endswith("attention")  # a parameter of the attention module itself, such as head embeddings
    return dimensions >= 2 and not of_heads
