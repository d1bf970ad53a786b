"""Entry of Linformer: attention over keys and values that are projected along the sequence. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.entries.common import own_queries
from model.attention.variant import Cached, Projection, Variant
from model.positions.registry import position_kind


def _length(config: ModelConfig) -> int:
    """The keys that a sequence is projected to."""
    assert config.linformer_length is not None, "faults are yielded first"
    return config.linformer_length


def _vectors(config: ModelConfig) -> tuple[int, ...]:
    """E and F, in one call."""
    if config.linformer_tokens is None:
        raise ValueError("the configuration is not resolved: linformer_tokens is null")
    return (2 * _length(config) * config.linformer_tokens,)


def _faults(config: ModelConfig) -> Iterator[Fault]:
    length, tokens = config.linformer_length, config.linformer_tokens
    if length is None:
        yield Fault("linformer_length", None, "linformer needs it: how many keys it projects a sequence to, such as 128")
    elif tokens is not None and length > tokens:
        yield Fault("linformer_length", length, f"at most linformer_tokens ({tokens}), which are projected to it")
    if position_kind(config).biases_scores:
        wanted = "linformer mixes the keys of all places, which leaves no distance; take learned, rope or none"
        yield Fault("position", config.position, wanted)
    if config.separates_documents:
        wanted = (
            "linformer mixes the keys of all tokens, so it cannot keep documents apart; it needs true, and data.packing "
            "concatenate"
        )
        yield Fault("attend_across_documents", False, wanted)


ENTRIES = {
    "linformer": Variant(
        target="model.attention.linformer:LinformerAttention",
        projections=lambda config: {
            "query": own_queries(config),
            "key_value": Projection("key_value", config.num_heads, 2 * config.head_width),
        },
        cached=lambda config: Cached(0, config.head_width, 0, config.head_width),
        vectors=_vectors,
        projected_keys=_length,
        causal=False,
        options=("linformer_length", "linformer_tokens"),
        refuses={
            "sliding_window": "projected keys have no places",
            "attention_sinks": "its softmax is over projected keys",
            "logit_softcap": "its softmax is over projected keys",
        },
        faults=_faults,
    ),
}
