"""One transformer block, the same for every attention variant."""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.registry import attention_class
from model.layers import Layers
from model.mlp import build_mlp
from model.positions.positions import Positions


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: ModelConfig, layers: Layers, number: int = 0) -> None:
        """`config`: that of the layer (model/attention/registry.py:layer_configs); `number`: which one it is, from 0."""
        super().__init__()
        self.attention_norm = layers.norm(config)
        self.attention = attention_class(config)(config, layers, number)
        self.mlp_norm = layers.norm(config)
        self.mlp = build_mlp(config, layers)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H). Sequence first: sequence parallelism shards the leading dimension."""
        x_SBH = x_SBH + self.dropout(self.attention(self.attention_norm(x_SBH), positions, cache))
        return x_SBH + self.dropout(self.mlp(self.mlp_norm(x_SBH)))
