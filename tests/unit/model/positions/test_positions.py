"""Biases of scores by position and mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.positions.masks import AttentionMask
from model.positions.positions import Positions, make_positions
from tests.unit.model.attention.layers import hidden, layer_of, positions_of

ALIBI = ModelConfig(attention="mha", hidden_size=20, num_layers=1, num_heads=6, head_dim=8, position="alibi")


def test_alibi_in_bf16_tells_neighbours_apart_far_into_the_sequence() -> None:
    bias = positions_of(ALIBI, 2048, dtype=torch.bfloat16).bias
    assert bias is not None
    assert bias[0, 0, -1, -4:].tolist() == [-0.75, -0.5, -0.25, 0.0]
    assert bias[0, 0, 5, 6] == -math.inf


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_is_relative_to_the_position_in_the_full_text(causal: bool) -> None:
    positions = Positions(2, 3, slopes_N=torch.tensor([0.5, 2.0]), mask=AttentionMask(causal))
    assert positions.bias is not None
    later = -math.inf if causal else 0.5
    assert positions.bias[0, 0].tolist() == [[-1.5, -1.0, -0.5, 0.0, later], [-2.0, -1.5, -1.0, -0.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_of_a_pass_share_one_mask(dtype: torch.dtype) -> None:
    mask = AttentionMask(documents_BT=torch.zeros(2, 7, dtype=torch.int32))
    positions = make_positions(ALIBI, 7, 0, dtype, torch.device("cpu"), mask)
    layer, seen = layer_of(ALIBI, dtype), set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.add(x.data_ptr()) if x.shape[-2:] == (7, 7) else None, lambda x: x
    ):
        for _ in range(3):
            layer(hidden(ALIBI, 7, dtype), positions)
    assert positions.bias is not None
    assert positions.bias.dtype == dtype
    assert seen == {positions.bias.data_ptr()}


@pytest.mark.parametrize(
    "fields",
    [{"position": "rope"}, {"position": "alibi"}, {"position": "none", "attend_across_documents": False, "end_of_document": 3}],
)
def test_blocks_compile_to_one_graph(fields: dict[str, Any]) -> None:
    """What all layers share of a mask is made inside a compiled block without a break; other masks are other graphs."""
    model = DecoderLM(ModelConfig(hidden_size=16, num_layers=2, num_heads=4, vocab_size=10, attention="mha", **fields)).eval()
    tokens_BS = torch.arange(12).remainder(10).view(2, 6)
    expected = model.logits(tokens_BS)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(model.logits(tokens_BS), expected, rtol=0, atol=0)
