"""Entries of what makes keys and values from latents or ties them: MLA, GLA, GTA. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.entries.common import kv_head_faults, kv_heads, own_queries, read_evenly
from model.attention.variant import MAPS, Cached, Count, Kept, Projection, Projections, Pruning, Rules, Variant
from model.positions.registry import position_kind

_OWN_CHANNELS = {"rope_fraction": "it has channels of its own for rope"}


def _latent_attention(
    latents: Count,
    options: tuple[str, ...],
    faults: Rules,
    pruning: Pruning = Pruning(),  # noqa: B008 (frozen)
) -> Variant:
    """Keys and values of heads from `latents` latents of the token; the latents are all that the cache keeps."""
    return Variant(
        target="model.attention.latent:LatentAttention",
        projections=lambda config: _projections(config, latents(config)),
        cached=_cached_latents,
        vectors=lambda config: (*_query_rank(config), (config.latent_dim or 0) // latents(config)),
        products=lambda config: (config.num_heads * _query_width(config), config.num_heads * config.head_width),
        rotary_width=lambda config: config.rope_dim or config.head_width,
        options=("query_rank", "latent_dim", "rope_dim", *options),
        refuses={"qk_norm": "its latents are normed, and when it generates heads have no keys", **_OWN_CHANNELS},
        faults=faults,
        maps=MAPS,
        pruning=pruning,
    )


def _query_width(config: ModelConfig) -> int:
    """Channels of a head's query and key: its own, and those for the key that all heads share."""
    return config.head_width + (config.rope_dim or 0)


def _query_rank(config: ModelConfig) -> tuple[int, ...]:
    return () if config.query_rank is None else (config.query_rank,)


def _projections(config: ModelConfig, latents: int) -> Projections:
    heads, width, projections = config.num_heads, (config.latent_dim or 0) // latents, {}
    if config.query_rank is None:
        projections["query"] = Projection("column", heads, _query_width(config))
    else:
        projections["query_latent"] = Projection("shared", 1, config.query_rank)
        projections["query"] = Projection("expand", heads, _query_width(config), config.query_rank)
    projections["latent"] = Projection("shared", latents, width)
    if config.rope_dim is not None:
        projections["shared_key"] = Projection("shared", 1, config.rope_dim)
    projections["key_value"] = Projection("expand", heads, 2 * config.head_width, width, latents)
    return projections


def _cached_latents(config: ModelConfig) -> Cached:
    """One vector, kept as a key: the latents and the shared key, which the absorbed form reads side by side."""
    width = (config.latent_dim or 0) + (config.rope_dim or 0)
    return Cached(1, width, 0, width)


def _latent_faults(config: ModelConfig) -> Iterator[Fault]:
    name = config.attention
    if config.latent_dim is None:
        yield Fault("latent_dim", None, f"{name} needs it: what the cache keeps of keys and values, such as 4 * head_dim")
    if config.query_rank == 0:
        yield Fault("query_rank", 0, f"{name} has no queries of rank 0; null projects them from the hidden state")
    if position_kind(config).rotates:
        if config.rope_dim is None:
            yield Fault("rope_dim", None, f"{name} needs it with position {config.position}: an even number of channels")
        elif config.rope_dim % 2:
            wanted = f"must be even with position {config.position} (channels rotate in pairs)"
            yield Fault("rope_dim", config.rope_dim, wanted)


def _grouped_latent_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from _latent_faults(config)
    latents = config.num_latents
    if latents is None:
        yield Fault("num_latents", None, f"gla needs it: a divisor of num_heads ({config.num_heads}) and of latent_dim")
        return
    for name, count in (("num_heads", config.num_heads), ("latent_dim", config.latent_dim or 0)):
        if count % latents:
            yield Fault("num_latents", latents, f"must divide {name} ({count})")


def _one_latent(config: ModelConfig) -> int:
    return 1


def _latents(config: ModelConfig) -> int:
    return config.num_latents or 1


def _pruned_latents(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune latents that no kept head reads; give each head a copy of its latent if the kept heads share them unevenly."""
    latents, width = _latents(config), (config.latent_dim or 0) // _latents(config)
    left = read_evenly(config, latents, kept) or len(kept[0])
    return {"num_latents": left, "latent_dim": left * width}


def _half(config: ModelConfig) -> int:
    return config.head_width // 2


def _tied_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from kv_head_faults(config)
    pairs = 2 if position_kind(config).rotates else 1
    if config.head_width % (2 * pairs):
        why = "half of a key is that of its value" + (", the other half rotates in pairs" if pairs > 1 else "")
        yield Fault("head_dim", config.head_width, f"gta needs a multiple of {2 * pairs} ({why})")


def _pruned_tied(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune tied heads that no kept head reads; give each head its own copy if the kept heads share them unevenly."""
    return {"num_kv_heads": read_evenly(config, kv_heads(config), kept) or len(kept[0])}


ENTRIES = {
    "mla": _latent_attention(_one_latent, (), _latent_faults),
    "gla": _latent_attention(
        _latents,
        ("num_latents",),
        _grouped_latent_faults,
        Pruning(_pruned_latents, lambda config: _latents(config) > 1),
    ),
    "gta": Variant(
        target="model.attention.latent:GroupedTiedAttention",
        projections=lambda config: {
            "query": own_queries(config),
            "key_value": Projection("key_value", kv_heads(config), config.head_width),
            "shared_key": Projection("shared", 1, _half(config)),
        },
        cached=lambda config: Cached(1, _half(config), kv_heads(config), config.head_width),
        rotary_width=_half,
        options=("num_kv_heads",),
        refuses={"qk_norm": "half of a key is half of its value, which has no norm", **_OWN_CHANNELS},
        faults=_tied_faults,
        maps=MAPS[1:],
        pruning=Pruning(_pruned_tied, lambda config: True),
    ),
}
