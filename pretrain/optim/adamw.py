"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from configs.schema import OptimizerConfig
from model.attention.registry import is_head_embedding
from pretrain.optim.groups import LR_SCALE, ParameterGroup


class AdamW:
    """The Recipe of `optimizer.kind: adamw`."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        """Matrices decay; norms, biases and what the attention module itself has, such as head embeddings, do not.

        Head embeddings may have another learning rate.
        """
        scaled = [name for name in dimensions if is_head_embedding(name)] if config.head_embedding_lr_scale != 1 else []
        decayed = tuple(name for name, count in dimensions.items() if count >= 2 and not _is_of_heads(name))
        spared = tuple(name for name in dimensions if name not in {*decayed, *scaled})
        return [
            ParameterGroup("decayed", decayed, {"weight_decay": config.weight_decay}),
            ParameterGroup("spared", spared, {"weight_decay": 0.0}),
            ParameterGroup("spared", tuple(scaled), {"weight_decay": 0.0, LR_SCALE: config.head_embedding_lr_scale}),
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


def _is_of_heads(name: str) -> bool:
    """Whether it is a parameter of the attention module itself, such as head embeddings."""
    return name.rpartition(".")[0].endswith("attention")
