"""Configurations of mfa, mhe_low_rank and tpa that have faults."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelConfig
from model.faults import model_faults

TPA: dict[str, Any] = {"attention": "tpa", "query_rank": 6, "key_rank": 2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attention": "mfa"}, "model.query_rank = null: mfa needs it: above 0, such as half of hidden_size"),
        ({"attention": "mfa", "query_rank": 0}, "model.query_rank = 0: mfa needs it: above 0"),
        ({"attention": "mhe_low_rank"}, "model.query_rank = null: mhe_low_rank needs it: a small number such as head_dim"),
        (
            {"attention": "mhe_low_rank", "query_rank": 4, "attention_kernel": "shared_scores"},
            "model.attention_kernel = 'shared_scores': with query_rank above 0 every head has its own scores",
        ),
        ({"attention": "mhe_low_rank", "query_rank": 4, "num_seeds": 3}, "model.num_seeds = 3: must divide num_heads (8)"),
        (TPA, "model.value_rank = null: tpa needs it: above 0, such as 2"),
        (TPA | {"value_rank": 2, "query_rank": 0}, "model.query_rank = 0: tpa needs it: above 0, such as 6"),
        (TPA | {"value_rank": 2, "qk_norm": True}, "model.qk_norm = true: tpa: the cache keeps factors of keys"),
        ({"attention": "mha", "query_rank": 4}, "model.query_rank = 4: only "),
    ],
)
def test_each_fault_names_its_field(fields: dict[str, Any], expected: str) -> None:
    (fault,) = model_faults({"model": ModelConfig(hidden_size=64, num_layers=1, num_heads=8, vocab_size=11, **fields)})
    assert str(fault).startswith(expected)


def test_rank_0_may_share_scores() -> None:
    fields: dict[str, Any] = {"attention": "mhe_low_rank", "query_rank": 0, "attention_kernel": "shared_scores"}
    assert not model_faults({"model": ModelConfig(hidden_size=64, num_layers=1, num_heads=8, vocab_size=11, **fields)})
