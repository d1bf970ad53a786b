"""Learned positions are added to the tokens at these positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.layers import Layers
from model.positions.learned import add_positions, position_table

CONFIG = ModelConfig(hidden_size=4, num_layers=1, num_heads=1, max_position_embeddings=6)


class SecondHalf(Layers):
    """The second of two ranks that shard a sequence."""

    def own_tokens(self, x_SBH: Tensor) -> Tensor:
        return x_SBH[x_SBH.shape[0] // 2 :]


def test_each_token_gets_the_vector_of_its_position() -> None:
    table = position_table(CONFIG)
    assert table.weight.shape == (6, 4)
    x_SBH = torch.randn(4, 3, 4)
    found = add_positions(x_SBH, table, Layers(), 2, 6)
    for token in range(4):
        assert torch.equal(found[token], x_SBH[token] + table.weight[2 + token])
    assert torch.equal(add_positions(x_SBH[2:], table, SecondHalf(), 2, 6), found[2:])


def test_past_the_table_and_without_one() -> None:
    table = position_table(CONFIG)
    with pytest.raises(ValueError, match="7 tokens, but max_position_embeddings is 6"):
        add_positions(torch.randn(2, 1, 4), table, Layers(), 5, 7)
    with pytest.raises(ValueError, match="not resolved: max_position_embeddings is null"):
        position_table(CONFIG.model_copy(update={"max_position_embeddings": None}))
