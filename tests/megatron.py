"""What tests of MHE inside megatron-core share."""

from __future__ import annotations

from typing import Any


def transformer_config(ranks: int, **changes: Any) -> Any:
    """megatron-core's configuration of a small model on the CPU."""
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "kv_channels": 6,  # num_attention_heads * kv_channels exceeds hidden_size
        "ffn_hidden_size": 48,
        "tensor_model_parallel_size": ranks,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.1,
    }
    return TransformerConfig(**{**values, **changes})
