"""Parameters and cached values of every variant at the size of the papers, counted by hand from their formulas."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelConfig
from model import registry
from model.attention.registry import attention_names
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.faults import model_faults
from tests.bidirectional import BIDIRECTIONAL, KIND

H, N, D, LAYERS = 768, 12, 64, 12
OUT = H * H
PROJECTED = {"kind": BIDIRECTIONAL, "linformer_length": 128, "linformer_tokens": 512}
TPA = {"query_rank": 6, "key_rank": 2, "value_rank": 2}
QUERIES = H * 384 + 384 * N * (D + 32)  # of mla and gla: down to a latent, and up
LATENT = {"query_rank": 384, "latent_dim": 256, "rope_dim": 32}
NORMS = {"mla": 384 + 256, "gla": 384 + 128, "mfa": 384}  # weights of the latents' norms, which the millions leave out
# the fields that it needs, millions of attention parameters as in the paper, those of a layer by hand, its cached values
FIGURES: dict[str, tuple[dict[str, Any], float, int, int]] = {
    "mha": ({}, 28.31, 3 * H * H + OUT, 2 * N * D),
    "skv": ({}, 21.23, 2 * H * H + OUT, N * D),
    "gqa": ({"num_kv_heads": 4}, 18.87, H * H + 2 * H * 4 * D + OUT, 2 * 4 * D),
    "mqa": ({}, 15.34, H * H + 2 * H * D + OUT, 2 * D),
    "el": ({}, 14.16, H * H + OUT, N * D),
    "sha": ({}, 8.85, 3 * H * D + OUT, 2 * D),
    "mhe_add": ({}, 8.88, 3 * H * D + 3 * N * D + OUT, 2 * D),
    "mhe_mul": ({}, 8.88, 3 * H * D + 3 * N * D + OUT, 2 * D),
    "mfa": ({"query_rank": 384}, 15.34, 2 * 384 * H + 2 * H * D + OUT, 2 * D),
    "mhe_low_rank": ({"query_rank": 64}, 10.05, 3 * H * D + 3 * N * D + 2 * 64 * H + OUT, 2 * D),
    "tpa": (TPA, 14.08, (6 + 2 + 2) * (N + D) * H + OUT, (2 + 2) * (N + D)),
    "mla": (LATENT, 23.30, QUERIES + H * (256 + 32) + 256 * 2 * N * D + OUT, 256 + 32),
    "gla": (LATENT | {"num_latents": 2}, 20.94, QUERIES + H * (256 + 32) + 128 * 2 * N * D + OUT, 256 + 32),
    "gta": ({"num_kv_heads": 4}, 16.81, H * H + H * 4 * D + H * D // 2 + OUT, 4 * D + D // 2),
    # MHA, and E and F of 128 keys for 512 tokens in each layer; no cache
    "linformer": (
        PROJECTED,
        29.88,
        3 * H * H + 2 * 128 * 512 + OUT,
        0,
    ),
    # MHA, four vectors of λ as wide as half a head, and the norm of heads
    "diff": ({}, 28.31, 3 * H * H + 4 * D // 2 + D + OUT, 2 * N * D),
    # twice the queries, and λ of each head
    "diff_v2": ({"num_kv_heads": 4}, 26.06, 2 * H * H + H * N + 2 * H * 4 * D + OUT, 2 * 4 * D),
}


@pytest.mark.parametrize("name", attention_names())
def test_figures_of_the_papers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS, BIDIRECTIONAL, KIND)
    fields, millions, of_a_layer, cached = FIGURES[name]
    sizes: dict[str, Any] = {
        "hidden_size": H,
        "num_layers": LAYERS,
        "num_heads": N,
        "bias": False,
        "vocab_size": 1,
        "position": "rope",
    }
    config = ModelConfig(attention=name, **sizes, **fields)
    assert not model_faults({"model": config})
    assert parameters(config)["attention"] == LAYERS * (of_a_layer + NORMS.get(name, 0))
    assert round(LAYERS * of_a_layer / 1e6, 2) == millions
    assert kv_cache_bytes_per_token(config, bytes_per_value=1) == LAYERS * cached
