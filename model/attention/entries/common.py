"""What entries of several families share."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.variant import Kept, Projection


def own_queries(config: ModelConfig) -> Projection:
    """A projection of head_dim columns for each head."""
    return Projection("column", config.num_heads, config.head_width)


def one_head(config: ModelConfig) -> int:
    return 1


def kv_heads(config: ModelConfig) -> int:
    """num_kv_heads, or all heads."""
    return config.num_kv_heads or config.num_heads


def kv_head_faults(config: ModelConfig) -> Iterator[Fault]:
    """Faults of num_kv_heads in a variant that needs it."""
    if config.num_kv_heads is None:
        yield Fault("num_kv_heads", None, f"{config.attention} needs it: a divisor of num_heads ({config.num_heads})")
    elif config.num_heads % config.num_kv_heads:
        yield Fault("num_kv_heads", config.num_kv_heads, f"must divide num_heads ({config.num_heads})")


def read_evenly(config: ModelConfig, shared: int, kept: Kept) -> int | None:
    """How many of a layer's `shared` parts the kept heads read, if each part has equally many readers; else None."""
    sharing, sizes = config.num_heads // shared, set()
    for of_layer in kept:
        read = [head // sharing for head in of_layer]
        sizes |= {read.count(part) for part in read}
    return len(kept[0]) // sizes.pop() if len(sizes) == 1 else None
