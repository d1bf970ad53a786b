"""Formulas against built models, counted FLOPs and collectives, real caches and the paper's table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.communication import Layout, differences, fake_count
from configs.schema import ModelConfig
from model.attention.registry import attention_names, attention_variant
from model.costs.accounting import (
    Collective,
    Gather,
    Sharding,
    StateBytes,
    collectives,
    flops_per_token,
    kv_cache_bytes_per_token,
    mhe_gather,
    overhang,
    parameters,
    sent_bytes,
    state_bytes,
)
from model.decoder import DecoderLM


def model_config(attention: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "attention": attention,
        "hidden_size": 24 if attention == "el" else 20,
        "num_layers": 3,
        "num_heads": 6,
        "head_dim": 4,
        "vocab_size": 23,
        "position": "none",
        "num_kv_heads": 3 if attention == "gqa" else None,
    }
    return ModelConfig(**fields | changes)


def counted(config: ModelConfig) -> dict[str, int]:
    """Parameters of a real model by part, sorted by name."""
    with torch.device("meta"):
        model = DecoderLM(config)
    parts = dict.fromkeys(parameters(config), 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".attention." in name:
            part = "attention"
        elif ".mlp." in name:
            part = "mlp"
        else:
            part = "output" if name.startswith("output") else "embeddings"
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", attention_names())
def test_parameters_of_every_option(name: str) -> None:
    options = itertools.product((True, False), ("gelu", "swiglu"), ("layernorm", "rmsnorm"), (True, False), ("learned", "rope"))
    for bias, activation, norm, tied, position in options:
        config = model_config(
            name,
            bias=bias,
            activation=activation,
            norm=norm,
            tie_embeddings=tied,
            position=position,
            max_position_embeddings=7 if position == "learned" else None,
        )
        assert parameters(config) == counted(config)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
@pytest.mark.parametrize(("position", "embedding_position"), [("none", "after"), ("rope", "before")])
def test_without_key_embedding_there_are_two_for_each_head(name: str, position: str, embedding_position: str) -> None:
    changes = {"position": position, "embedding_position": embedding_position}
    config, full = model_config(name, key_embedding=False, **changes), model_config(name, **changes)
    assert parameters(config) == counted(config)
    assert parameters(full)["attention"] - parameters(config)["attention"] == 3 * 6 * 4  # layers, heads, head_dim


@pytest.mark.parametrize(
    ("name", "changes", "millions", "exact"),
    [
        ("mha", {}, 28.31, 12 * 4 * 768 * 768),
        ("skv", {}, 21.23, 12 * 3 * 768 * 768),
        ("mqa", {}, 15.34, 12 * (2 * 768 * 768 + 2 * 768 * 64)),
        ("gqa", {"num_kv_heads": 4}, 18.87, 12 * (2 * 768 * 768 + 2 * 768 * 256)),
        ("el", {}, 14.16, 12 * 2 * 768 * 768),
        ("sha", {}, 8.85, 12 * (768 * 768 + 3 * 768 * 64)),
        ("mhe_add", {}, 8.88, 12 * (768 * 768 + 3 * 768 * 64 + 3 * 12 * 64)),
        ("mhe_mul", {}, 8.88, 12 * (768 * 768 + 3 * 768 * 64 + 3 * 12 * 64)),
    ],
)
def test_the_papers_table(name: str, changes: dict[str, Any], millions: float, exact: int) -> None:
    config = model_config(name, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, bias=False, **changes)
    assert parameters(config)["attention"] == counted(config)["attention"] == exact
    assert round(exact / 1e6, 2) == millions


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_the_matrix_products_of_a_training_step(name: str, activation: str) -> None:
    config, length = model_config(name, activation=activation), 8
    with torch.device("meta"):
        model, tokens_BS = DecoderLM(config), torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens_BS, tokens_BS).sum().backward()
    # torch counts attention without its mask, so the pairs under the mask are counted here.
    counts = counter.get_flop_counts()["Global"].items()
    linear = sum(flops for operator, flops in counts if str(operator) in ("aten.mm", "aten.addmm"))
    pairs = sum(1 for t in range(length) for j in range(length) if j <= t)
    scores_and_values = 3 * config.num_layers * config.num_heads * pairs * 2 * (2 * config.head_width)
    assert flops_per_token(config, length) * length == linear + scores_and_values


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_bytes_are_those_of_a_real_cache(name: str, dtype: torch.dtype) -> None:
    rotates_embeddings = "embedding_position" in attention_variant(name).options
    config = model_config(name, position="rope", embedding_position="before" if rotates_embeddings else "after")
    model = DecoderLM(config).to(dtype)
    cache = model.new_cache(batch_size=2, capacity=5)
    with torch.no_grad():
        model(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    stored = sum(part.nbytes for layer in cache.layers for part in (layer.k_BKSD, layer.v_BKSD))
    assert kv_cache_bytes_per_token(config, dtype.itemsize) * 2 * 5 == stored


@pytest.mark.parametrize(
    ("name", "values"), [("mha", 2 * 24), ("gqa", 2 * 12), ("skv", 24), ("el", 24), ("mqa", 8), ("sha", 8), ("mhe_add", 8)]
)
def test_cached_values_of_a_token_and_layer(name: str, values: int) -> None:
    assert kv_cache_bytes_per_token(model_config(name), bytes_per_value=1) == 3 * values


SPLIT_STYLES: list[tuple[dict[str, Any], int, torch.dtype]] = [
    ({"position": "learned", "max_position_embeddings": 16}, 8, torch.bfloat16),
    ({"position": "rope", "norm": "rmsnorm", "tie_embeddings": False, "vocab_size": 40}, 2, torch.float32),
    ({"position": "alibi", "activation": "swiglu", "bias": False, "tie_embeddings": False}, 4, torch.float64),
]


def split_config(attention: str, **changes: Any) -> ModelConfig:
    """Splits over 2, 4 and 8 ranks; a vocabulary that none of them divides."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "head_dim": 8, "ffn_hidden_size": 48, "vocab_size": 37}
    return model_config(attention, **{**sizes, "num_kv_heads": 4 if attention == "gqa" else None, **changes})


def check_collectives(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> None:
    sizes = 3, 8  # sequences, tokens
    expected = collectives(config, layout.tensor, layout.sequence, layout.way, *sizes, dtype.itemsize)
    assert differences(fake_count(config, layout, *sizes, dtype), expected) == []


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_are_those_of_every_option(name: str, sequence: bool) -> None:
    ways: tuple[Gather, ...] = (
        ("weights", "activations") if attention_variant(name).shared(split_config(name)) else ("weights",)
    )
    for (style, tensor, dtype), gather in itertools.product(SPLIT_STYLES, ways):
        check_collectives(split_config(name, **style), Layout(tensor, sequence, gather), dtype)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gqa", {"num_kv_heads": 2}),
        ("gqa", {"num_kv_heads": 8}),
        ("mhe_add", {"key_embedding": False}),
        ("mhe_add", {"attention_kernel": "shared_scores"}),
        ("mhe_mul", {"position": "rope", "embedding_position": "before"}),
        ("mha", {"num_layers": 1, "head_dim": 4, "norm": "rmsnorm", "bias": False}),
        ("mha", {"attend_across_documents": False, "end_of_document": 3}),
    ],
)
@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_with_fields_of_single_variants(name: str, changes: dict[str, Any], sequence: bool) -> None:
    check_collectives(split_config(name, **changes), Layout(4, sequence, "weights"), torch.bfloat16)


def test_one_rank_moves_nothing() -> None:
    config = split_config("mhe_add")
    assert collectives(config, 1, sequence=True, gather="weights", micro_batch_size=3, sequence_length=8) == []


@pytest.mark.parametrize(("op", "sent"), [("all_reduce", 2 * 7 * 10), ("all_gather", 7 * 10), ("reduce_scatter", 7 * 10)])
def test_bytes_that_a_ring_sends(op: Any, sent: int) -> None:
    assert sent_bytes(Collective("mlp", "fwd", op, 3, 80), tensor=8) == sent


@pytest.mark.parametrize(
    ("bias", "sequence", "tokens"), [(False, False, 12), (True, False, 13), (False, True, 16), (True, True, 17)]
)
@pytest.mark.parametrize("name", ["sha", "mhe_add", "mhe_mul"])
def test_weights_are_gathered_from_so_many_tokens_on(name: str, bias: bool, sequence: bool, tokens: int) -> None:
    """T ≥ C (H + bias) / 2 H, with sequence parallelism T ≥ 2 C (H + bias) / 3 H, here of C = 24 columns and H = 64."""
    config = split_config(name, bias=bias)
    assert [mhe_gather(config, count, sequence) for count in (1, tokens - 1, tokens, 1000)] == [
        "activations",
        "activations",
        "weights",
        "weights",
    ]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tokens", [11, 12, 16, 17])
def test_what_is_gathered_sends_less_in_the_whole_model(sequence: bool, tokens: int) -> None:
    config = split_config("mhe_add")

    def sent(gather: Gather) -> float:
        return sum(sent_bytes(move, 8) for move in collectives(config, 8, sequence, gather, 1, tokens))

    other: Gather = "activations" if (chosen := mhe_gather(config, tokens, sequence)) == "weights" else "weights"
    assert sent(chosen) < sent(other)


@pytest.mark.parametrize("heads", [64, 128])
def test_shares_of_mha(heads: int) -> None:
    """MHA sums the hidden state four times in a layer, MHE three times and its outputs, 3/n as wide, once.

    With sequence parallelism it is ten moves against seven of the hidden state and two of the outputs.
    """

    def sent(name: str, sequence: bool) -> float:
        config = split_config(name, hidden_size=64 * heads, num_heads=heads, head_dim=64, num_layers=1)
        moves = collectives(config, 8, sequence, "weights", micro_batch_size=1024, sequence_length=4096)
        return sum(sent_bytes(move, 8) for move in moves if move.part in ("attention", "mlp"))

    assert sent("mhe_add", False) / sent("mha", False) == pytest.approx((3 + 3 / heads) / 4, rel=1e-4)
    assert sent("mhe_add", True) / sent("mha", True) == pytest.approx((7 + 2 * 3 / heads) / 10, rel=1e-4)


@pytest.mark.parametrize(
    ("sharding", "bf16", "expected"),
    [  # 1000 parameters over 8 ranks, 125 each
        ("zero0", False, (4000, 4000, 4000, 8000)),
        ("zero1", False, (4000, 4000, 500 + 500, 1500)),
        ("zero1", True, (2000, 4000 + 2000, 4000 + 2000, 1500)),
        ("zero2", False, (4000, 500, 500 + 500, 1500)),
        ("zero2", True, (2000, 500, 500, 1500)),
        ("zero3", False, (500, 500, 500 + 500, 1500)),
        ("zero3", True, (250, 500, 500 + 500, 1500)),
        ("fsdp", False, (500, 500, 500, 1000)),
        ("fsdp", True, (500, 500, 500, 1000)),
    ],
)
def test_training_state_of_a_rank(sharding: Sharding, bf16: bool, expected: tuple[int, ...]) -> None:
    assert state_bytes(1000, sharding, 8, bf16) == StateBytes(*expected)
    assert state_bytes(999, sharding, 8, bf16).optimizer == (8000 - 8 if sharding == "zero0" else expected[3])


def test_training_state_that_is_not_cut() -> None:
    assert state_bytes(1000, "zero3", 8, True, whole=40) == StateBytes(2 * (125 + 40), 500, 1000, 1500)
    assert state_bytes(1000, "zero3", 1, True, whole=40).parameters == 2000
    assert state_bytes(1000, "zero2", 8, False, overhang=30) == StateBytes(4000, 4 * 155, 4 * 155 + 500, 1500)
    assert state_bytes(1000, "zero1", 8, False, overhang=30).accumulated == 4000
    assert state_bytes(1000, "zero2", 8, True, overhang=30) == state_bytes(1000, "zero2", 8, True)
    with pytest.raises(ValueError, match="ZeRO 0 has no bf16"):
        state_bytes(1000, "zero0", 8, True)


def test_parameters_that_reach_beyond_a_share() -> None:
    sizes = [30, 50, 20, 10]  # shares of 28: [0, 28), [28, 56), [56, 84), [84, 110)
    assert [overhang(sizes, 4, rank) for rank in range(4)] == [30 - 28, 80 - 28, 70 - 28, 30 - 26]
    assert overhang(sizes, 1, 0) == 0
    assert [overhang([4, 4], 2, rank) for rank in range(2)] == [0, 0]
    assert overhang([1], 3, 2) == 0
