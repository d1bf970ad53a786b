"""The MLP of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.layers import Layers


class GeluMLP(nn.Module):
    """down(gelu(up(x))), (S, B, H) → (S, B, H)."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.up = layers.column(config.hidden_size, config.ffn_width, config.bias)
        self.down = layers.row(config.ffn_width, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.gelu(self.up(x_SBH)))
        return hidden


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), (S, B, H) → (S, B, H); Shazeer 2020 (arXiv 2002.05202), section 2."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        # Two layers instead of one of twice the width, so that a rank's shards of both hold the same channels.
        self.gate = layers.column(config.hidden_size, config.ffn_width, config.bias)
        self.up = layers.column(config.hidden_size, config.ffn_width, config.bias)
        self.down = layers.row(config.ffn_width, config.hidden_size, config.bias)
        self.project = layers.project

    def forward(self, x_SBH: Tensor) -> Tensor:
        gate, up = self.project(x_SBH, self.gate, self.up)
        hidden: Tensor = self.down(F.silu(gate) * up)
        return hidden


def build_mlp(config: ModelConfig, layers: Layers) -> nn.Module:
    return GeluMLP(config, layers) if config.activation == "gelu" else SwigluMLP(config, layers)
