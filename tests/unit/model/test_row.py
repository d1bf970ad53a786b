"""What the registry says of a kind of model reaches its attention and its costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.schema import ModelConfig
from model import registry
from model.build import build_model
from model.costs.flops import flops_per_token
from model.initialization import init_weights

CONFIG = ModelConfig(
    attention="mha", hidden_size=16, num_layers=2, num_heads=2, vocab_size=11, max_position_embeddings=6, position="learned"
)


def outputs(later: int) -> torch.Tensor:
    """The model's output for the first of six tokens, with another last token."""
    model = build_model(CONFIG)
    init_weights(model, 0)
    with torch.no_grad():
        out_BSV: torch.Tensor = model(torch.tensor([[1, 2, 3, 4, 5, later]]))
    return out_BSV[:, 0] if out_BSV.shape[0] == 1 else out_BSV[0]


@pytest.mark.parametrize("causal", [True, False])
def test_only_tokens_of_a_model_that_is_not_causal_attend_to_later_ones(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setitem(registry._KINDS, "decoder", replace(registry.model_kind("decoder"), causal=causal))
    assert torch.equal(outputs(6), outputs(7)) == causal


def test_flops_count_the_keys_that_a_token_attends_to(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = flops_per_token(CONFIG, 7)
    monkeypatch.setitem(registry._KINDS, "decoder", replace(registry.model_kind("decoder"), causal=False))
    # Two products, multiply and add, forward and twice backward: 12 FLOPs for each of 16 channels of 2 layers and 7 − 4 keys.
    assert flops_per_token(CONFIG, 7) - causal == 12 * 16 * 2 * 3
