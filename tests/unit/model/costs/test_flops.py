"""FLOPs against those that torch counts in a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention.registry import layer_configs
from model.costs.flops import executed_flops_per_token, flops_per_token
from model.decoder import DecoderLM
from tests.needs import causal_names
from tests.unit.model.costs.models import PATTERN, model_config

NAMES: list[str | tuple[str, ...]] = [*causal_names(), PATTERN]
CASES: list[tuple[str | tuple[str, ...], dict[str, Any]]] = [
    *((name, {"activation": activation}) for name in NAMES for activation in ("gelu", "swiglu")),
    ("mha", {"output_gate": "elementwise", "qk_norm": True}),
    ("mhe_add", {"output_gate": "head"}),
    ("mqa", {"sliding_window": 3}),
    ("mhe_mul", {"sliding_window": 4, "full_attention_every": 3}),
    ("gqa", {"sliding_window": 9}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_flops_are_the_matrix_products_of_a_training_step(name: str | tuple[str, ...], changes: dict[str, Any]) -> None:
    config, length = model_config(name, **changes), 8
    with torch.device("meta"):
        model, tokens_BS = DecoderLM(config), torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.layers.losses(model(tokens_BS), tokens_BS).sum().backward()
    # torch counts attention without its mask, so the pairs under the mask are counted here.
    counts = counter.get_flop_counts()["Global"].items()
    linear = sum(flops for operator, flops in counts if str(operator) in ("aten.mm", "aten.addmm"))
    windows = [layer.sliding_window or length for layer in layer_configs(config)]
    pairs = sum(1 for window in windows for t in range(length) for j in range(length) if j <= t < j + window)
    # Channels of a head's scores and averages: two maps of half or of all channels, or 8 of the key that all heads share, too.
    width = config.head_width
    channels = {"diff": 3 * width, "diff_v2": 4 * width, "mla": 2 * width + 8, "gla": 2 * width + 8}
    scores_and_values = 3 * config.num_heads * pairs * 2 * channels.get(str(name), 2 * width)
    # torch counts products with several latents, 12 wide each, among those of attention.
    latents = 3 * config.num_layers * length * 2 * 12 * config.num_heads * 2 * config.head_width if name == "gla" else 0
    assert flops_per_token(config, length) * length == linear + latents + scores_and_values


def test_executed_flops_count_what_kernels_compute() -> None:
    """By hand: 7 products for each head instead of 6; with shared scores 4 narrow products and 3 of n (d + 1) columns."""
    config, length = model_config("mhe_add"), 8
    pairs, columns = length * (length + 1) // 2, config.num_heads * config.head_width
    rest = flops_per_token(config, length) * length - 6 * 2 * config.num_layers * pairs * columns
    by_heads = 7 * columns
    shared = 4 * config.head_width + 3 * config.num_heads * (config.head_width + 1)
    for shares, products in ((False, by_heads), (True, shared)):
        executed = executed_flops_per_token(config, length, shares) * length
        assert executed == pytest.approx(rest + 2 * config.num_layers * pairs * products)


@pytest.mark.parametrize("changes", [{"activation": "swiglu"}, {"dropout": 0.1}])
def test_recomputation_executes_the_products_that_torch_counts(changes: dict[str, object]) -> None:
    """What a second forward pass of the blocks adds: matrices as torch counts them, of attention QKᵀ and PV once more."""
    config, length = model_config("mha", **changes), 8
    counts = []
    for recomputes in (False, True):
        with torch.device("meta"):
            model, tokens_BS = DecoderLM(config, recompute_activations=recomputes), torch.zeros(1, length, dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model.layers.losses(model(tokens_BS), tokens_BS).sum().backward()
        found = counter.get_flop_counts()["Global"].items()
        counts.append(sum(flops for operator, flops in found if str(operator) in ("aten.mm", "aten.addmm")))
    of_attention = 2 * config.num_layers * (length * (length + 1) // 2) * 2 * config.num_heads * config.head_width
    once, twice = (executed_flops_per_token(config, length, False, recomputes) * length for recomputes in (False, True))
    assert twice - once == pytest.approx(counts[1] - counts[0] + of_attention)
