"""Configurations that the native Hugging Face class refuses."""

from __future__ import annotations

from typing import Any

import pytest

from model.huggingface.configuration_manyheads import ManyheadsConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_gate": "channel"}, "known are null, elementwise, head"),
        ({"position": "rope", "head_dim": 6, "rope_fraction": 0.5}, "an even number of the 6 channels"),
        ({"attention_window": 0}, "attention_window 0: must be null or"),
        ({"attention": "mhe"}, "attention 'mhe': known are mha"),
        ({"attention": ["mha", "mhe"]}, "attention 'mhe': known are mha"),
        ({"position": "relative"}, "known are learned, rope, alibi, none"),
        ({"norm": "batchnorm"}, "known are layernorm, rmsnorm"),
        ({"hidden_act": "relu"}, "known are gelu, silu"),
        ({"embedding_position": "within"}, "known are before, after"),
        ({"embedding_position": "before"}, "used only by mhe_add and mhe_mul with rope"),
        (
            {"embedding_position": "before", "position": "rope", "attention": "mha"},
            "used only by mhe_add and mhe_mul with rope",
        ),
        ({"num_attention_heads": 7}, r"num_attention_heads \(7\) must divide hidden_size \(768\)"),
        ({"num_attention_heads": 0}, "num_attention_heads 0: must be a whole number above 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
        ({"head_dim": -4}, "head_dim -4"),
        ({"head_dim": 5, "position": "rope"}, "must be even with rope"),
        ({"attention": "el", "head_dim": 32}, r"\(12 \* 32\) must be hidden_size \(768\)"),
        ({"attention": "gqa"}, "num_kv_heads None: gqa needs a divisor of num_attention_heads"),
        ({"attention": "gqa", "num_kv_heads": 5}, "num_kv_heads 5: must divide num_attention_heads"),
        ({"num_seeds": 5}, "num_seeds 5: must divide num_attention_heads"),
        ({"attention": "mqa", "num_key_value_heads": 12}, "the cache of mqa keeps 1"),
        ({"attention": "mha", "num_key_value_heads": 1}, "the cache of mha keeps 12"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"initializer_range": 0.0}, "initializer_range"),
        ({"end_of_document": 3}, "used only with attend_across_documents false"),
        ({"attend_across_documents": False}, "needs a token id below 32000"),
        ({"attend_across_documents": False, "end_of_document": 32000}, "needs a token id below 32000"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManyheadsConfig(**fields)
