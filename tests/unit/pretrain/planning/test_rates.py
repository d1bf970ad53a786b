"""Work of a micro-batch against the formulas of FLOPs, and rates against what the hardware table says."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.arguments import variants_of
from configs.schema import ModelConfig
from model.attention.registry import layer_configs
from model.attention.usual import needed
from model.costs.flops import flops_per_token
from pretrain.planning.cluster import make_cluster
from pretrain.planning.rates import KEYS, MEMORY, PRODUCTS, attention_seconds, product_seconds
from pretrain.planning.work import Attention, Product, Share, layer_work, output_work

H100 = make_cluster("h100").device
LENGTH = 4096


def model(attention: str, **fields: Any) -> ModelConfig:
    given: dict[str, Any] = {
        "hidden_size": 1024,
        "num_layers": 2,
        "num_heads": 32,
        "head_dim": 32,
        "vocab_size": 4096,
        "position": "none",
    }
    given |= {"activation": "swiglu", **fields}
    short = ModelConfig(attention=attention, **given)
    return ModelConfig(attention=attention, **given | needed(short))


@pytest.mark.parametrize("name", variants_of("all"))
def test_products_and_attention_add_up_to_the_flops_of_the_model(name: str) -> None:
    """Heads of differential and latent attention are no multiple of 32 wide, and cost more than the formula's."""
    config, share = model(name), Share(2, LENGTH)
    works = [*(layer_work(layer, share) for layer in layer_configs(config)), output_work(config, share)]
    products = sum(one.flops for work in works for one in work.products)
    attention = sum(one.flops for work in works for one in work.attention)
    counted = 3 * (products + attention) / share.tokens
    assert counted == pytest.approx(flops_per_token(config, LENGTH), rel=0.25 if config.latent_dim or "diff" in name else 0.01)
    assert counted >= 0.99 * flops_per_token(config, LENGTH)


@pytest.mark.parametrize("gather", ["weights", "activations"])
@pytest.mark.parametrize("name", ["mha", "gqa", "mhe_add", "mla"])
def test_tensor_parallel_ranks_compute_the_model_together(name: str, gather: Any) -> None:
    config = model(name)
    layer = layer_configs(config)[0]

    def flops(tensor: int) -> float:
        work = layer_work(layer, Share(2, LENGTH, tensor=tensor, sequence=tensor > 1, gather=gather))
        return tensor * (sum(one.flops for one in work.products) + sum(one.flops for one in work.attention))

    assert flops(4) == pytest.approx(flops(1))


def test_a_large_product_runs_at_the_measured_rate_and_small_ones_slower() -> None:
    def rate(*shape: float) -> float:
        one = Product(*shape)
        return one.flops / product_seconds(one, H100, "bf16", 2)

    best = PRODUCTS * 794.5e12
    assert 0.9 * best < rate(128 * 132, 256 * 64, 8192) <= best
    assert rate(8192, 8192, 64) < 0.4 * best  # few multiply-adds for each value written
    assert rate(8192, 24, 4096) < 0.2 * best  # a shared projection's shard is narrower than a tile
    moved = 2 * (64 * 8192 + 8192 * 64 + 64 * 64)
    assert product_seconds(Product(64, 64, 8192), H100, "bf16", 2) >= moved / (MEMORY * 3.35e12)


@pytest.mark.parametrize(("kernel", "width", "tflops"), [("flash", 64, 299), ("flash", 128, 335), ("cudnn", 128, 539)])
def test_attention_runs_at_the_measured_rate(kernel: str, width: int, tflops: float) -> None:
    pairs, length = 1e9, 2**20
    seconds = attention_seconds(Attention("flash", 4 * width * pairs, pairs, length), H100, kernel, "bf16")
    assert 4 * width * pairs / seconds == pytest.approx(tflops * 1e12, rel=0.001)
    short = attention_seconds(Attention("flash", 4 * width * pairs, pairs, KEYS), H100, kernel, "bf16")
    assert short == pytest.approx(2 * seconds, rel=0.001)


def test_narrow_heads_cost_as_much_as_the_tile_that_they_fill() -> None:
    def flops(head_dim: int, heads: int, **fields: Any) -> float:
        layer = layer_configs(model("mha", num_heads=heads, head_dim=head_dim, **fields))[0]
        return layer_work(layer, Share(1, LENGTH)).attention[0].flops

    assert flops(32, 32) == flops(64, 16)
    assert flops(8, 128) == 4 * flops(32, 32)
    assert flops(64, 16, position="alibi") == 2 * flops(64, 16)  # a bias in memory: no tile is left out


def test_compiling_and_new_norms_move_fewer_bytes() -> None:
    layer = layer_configs(model("mha", norm="rmsnorm", position="rope"))[0]
    shares = [Share(1, 512, plain_norms=True), Share(1, 512), Share(1, 512, compiled=True)]
    moved = [layer_work(layer, share).forward for share in shares]
    assert moved[0] > 1.3 * moved[1] > 1.3 * moved[2]
