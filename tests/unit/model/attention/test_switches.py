"""Switches that every variant has, against the formulas of tests/reference.py, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from model.attention.base import Attention
from model.attention.faults import attention_faults
from model.attention.registry import attention_variant
from model.positions.masks import AttentionMask
from tests.needs import causal_names
from tests.unit.model.attention.layers import (
    assert_equals_formula,
    hidden,
    layer_of,
    positions_of,
    through_a_cache,
)
from tests.unit.model.attention.test_variants import DOCUMENTS, PADDING, kernels_of, model_config

BEFORE: dict[str, Any] = {"position": "rope", "embedding_position": "before"}
SWITCHES: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True, "position": "rope"},
    "output_gate=elementwise": {"output_gate": "elementwise"},
    "output_gate=head": {"output_gate": "head", "position": "alibi", "bias": False},
    "rope_fraction": {"rope_fraction": 0.5, "position": "rope"},
    "sliding_window": {"sliding_window": 3, "position": "alibi"},
    "attention_sinks": {"attention_sinks": True, "position": "rope"},
    "logit_softcap": {"logit_softcap": 0.7, "position": "alibi"},
}
# With what only some variants have.
SPECIAL: list[tuple[str, str, dict[str, Any]]] = [
    ("qk_norm", "mhe_add", BEFORE),
    ("qk_norm", "mhe_mul", BEFORE | {"num_seeds": 3}),
    ("rope_fraction", "mhe_add", BEFORE),
    ("rope_fraction", "mhe_mul", BEFORE),
    ("attention_sinks", "mhe_add", BEFORE),
    ("attention_sinks", "mhe_add", {"position": "alibi", "key_embedding": False, "num_seeds": 3, "sliding_window": 3}),
    ("attention_sinks", "mhe_mul", {"logit_softcap": 0.5, "sliding_window": 4}),
    ("attention_sinks", "mhe_add", {"position": "none", "head_embeddings": False}),
    ("logit_softcap", "mhe_add", BEFORE),
    ("logit_softcap", "mhe_add", {"position": "rope", "attention_sinks": True, "sliding_window": 3}),
    ("sliding_window", "mqa", {"position": "rope"}),
    ("output_gate=head", "sha", {"position": "none", "num_seeds": 3}),
]
CASES = [
    pytest.param(name, SWITCHES[switch], id=f"{name}-{switch}")
    for switch in SWITCHES
    for name in causal_names()
    if not set(SWITCHES[switch]) & set(attention_variant(name).refuses)
]
CASES += [
    pytest.param(name, SWITCHES[switch] | changes, id="-".join([name, switch, *map(str, changes.values())]))
    for switch, name, changes in SPECIAL
]
MASK = AttentionMask(valid_BT=PADDING, documents_BT=DOCUMENTS)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_equals_its_formula_with_every_kernel(name: str, changes: dict[str, Any]) -> None:
    """Gradients, too; with padding and documents by the kernel that is chosen."""
    config = model_config(name, **changes)
    assert_equals_formula(config, kernels=[kernel for kernel in kernels_of(name, changes) if not refuses(config, kernel)])
    assert_equals_formula(config, MASK)


def refuses(config: ModelConfig, kernel: str) -> bool:
    """Whether a switch excludes a kernel that the variant has."""
    faults = attention_faults(config.model_copy(update={"attention_kernel": kernel}))
    return any(fault.key == "attention_kernel" for fault in faults)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_tokens_through_a_cache_equal_one_pass(name: str, changes: dict[str, Any]) -> None:
    config = model_config(name, **changes)
    layer, x_SBH = layer_of(config), hidden(config)
    found_SBH, expected_SBH = through_a_cache(config, layer, x_SBH), layer(x_SBH, positions_of(config))
    torch.testing.assert_close(found_SBH, expected_SBH, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul", "mhe_low_rank"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_values_that_are_grouped_do_not_know_of_sinks(name: str, seeds: int) -> None:
    """G_ij = V_i·V_j, from the values of each head written out."""
    config = model_config(name, attention_sinks=True, num_seeds=seeds, position="none")
    layer, x_SBH = layer_of(config), hidden(config)
    assert isinstance(layer, Attention)
    _, v_BGSD = layer.keys_values(x_SBH, positions_of(config))
    v_BNSD, embedding = v_BGSD.repeat_interleave(6 // seeds, dim=1), layer.get_parameter("value_embedding")[:, None]
    v_BNSD = v_BNSD * (1 + embedding) if name == "mhe_mul" else v_BNSD + embedding
    flat_NF = v_BNSD.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.value_gram(v_BGSD, layer.own_rows(), layer.layers), flat_NF @ flat_NF.T)
