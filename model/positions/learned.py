"""Learned positions: one vector per position, added to the token's embedding."""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.layers import Layers


def position_table(config: ModelConfig) -> nn.Embedding:
    """The table, (max_position_embeddings, H), of a resolved configuration."""
    if config.max_position_embeddings is None:
        raise ValueError("the configuration is not resolved: max_position_embeddings is null")
    return nn.Embedding(config.max_position_embeddings, config.hidden_size)


def add_positions(
    x_SBH: Tensor, table: nn.Embedding, layers: Layers, start: int, end: int, restarts_BT: Tensor | None = None
) -> Tensor:
    """Add positions [start, end) to the embeddings of this rank's tokens, (S, B, H). ValueError past the table's end.

    `restarts_BT`: the position of each token where documents count from their own first token.
    """
    if end > table.num_embeddings:
        raise ValueError(f"{end} tokens, but max_position_embeddings is {table.num_embeddings}")
    if restarts_BT is not None:
        return x_SBH + layers.own_tokens(table(restarts_BT[:, start:end].t()))
    return x_SBH + layers.own_tokens(table.weight[start:end, None])
