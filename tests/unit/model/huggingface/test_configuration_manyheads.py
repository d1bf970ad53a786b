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
        ({"embedding_position": "before"}, "used only by mhe_add, mhe_mul and mhe_low_rank with rope"),
        (
            {"embedding_position": "before", "position": "rope", "attention": "mha"},
            "used only by mhe_add, mhe_mul and mhe_low_rank with rope",
        ),
        ({"num_attention_heads": 7}, r"num_attention_heads \(7\) must divide hidden_size \(768\)"),
        ({"num_attention_heads": 0}, "num_attention_heads 0: must be a whole number above 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
        ({"head_dim": -4}, "head_dim -4"),
        ({"head_dim": 5, "position": "rope"}, "must be even with rope"),
        ({"attention": "el", "head_dim": 32}, r"\(12 \* 32\) must be hidden_size \(768\)"),
        ({"attention": "gqa"}, "num_kv_heads None: gqa needs a divisor of num_attention_heads"),
        ({"attention": "gqa", "num_kv_heads": 5}, "num_kv_heads 5: must divide num_attention_heads"),
        ({"attention": "gta", "head_dim": 6, "num_kv_heads": 4, "position": "rope"}, "head_dim 6: gta needs a multiple of 4"),
        ({"attention": "mla"}, "latent_dim None: mla needs a whole number above 0"),
        ({"attention": "mla", "latent_dim": 8, "query_rank": 0}, "query_rank 0: must be null or a whole number above 0"),
        ({"attention": "mla", "latent_dim": 8, "rope_dim": -2}, "rope_dim -2: must be null or a whole number above 0"),
        ({"attention": "mla", "latent_dim": 8, "position": "rope"}, "rope_dim None: mla needs an even number with rope"),
        ({"attention": "gla", "latent_dim": 8}, "num_latents None: gla needs a whole number above 0"),
        ({"attention": "gla", "latent_dim": 8, "num_latents": 3}, r"num_latents 3: must divide .* and latent_dim \(8\)"),
        ({"num_seeds": 5}, "num_seeds 5: must divide num_attention_heads"),
        ({"attention": "mqa", "num_key_value_heads": 12}, "the cache of mqa keeps 1"),
        ({"attention": "mha", "num_key_value_heads": 1}, "the cache of mha keeps 12"),
        ({"attention": "mfa"}, "query_rank None: mfa needs a whole number above 0"),
        ({"attention": "mhe_low_rank", "query_rank": -1}, "query_rank -1: mhe_low_rank needs"),
        ({"attention": "tpa", "query_rank": 6, "key_rank": 2}, "value_rank None: tpa needs"),
        ({"attention": "mhe_add", "head_embeddings": False}, "without them it is sha"),
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
