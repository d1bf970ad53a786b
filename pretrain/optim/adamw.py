"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from configs.schema import OptimizerConfig
from model.attention.registry import is_attention_output, is_head_embedding
from pretrain.optim.groups import LR_SCALE, ParameterGroup


class AdamW:
    """The Recipe of `optimizer.kind: adamw`."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        """Matrices decay; norms, biases and what the attention module itself has, such as head embeddings, do not.

        Head embeddings and the output projections of attention may have another learning rate.
        """
        decay, spare = {"weight_decay": config.weight_decay}, {"weight_decay": 0.0}
        of_heads, of_outputs = config.head_embedding_lr_scale, config.attention_output_lr_scale
        embeddings = tuple(name for name in dimensions if of_heads != 1 and is_head_embedding(name))
        outputs = tuple(name for name in dimensions if of_outputs != 1 and is_attention_output(name))
        others = {name: count for name, count in dimensions.items() if name not in {*embeddings, *outputs}}
        decayed = tuple(name for name, count in others.items() if count >= 2 and not _is_of_heads(name))
        return [
            ParameterGroup("decayed", decayed, decay),
            ParameterGroup("spared", tuple(name for name in others if name not in decayed), spare),
            ParameterGroup("spared", embeddings, {**spare, LR_SCALE: of_heads}),
            ParameterGroup("decayed", outputs, {**decay, LR_SCALE: of_outputs}),
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
