"""Collectives by formula against those that tensor-parallel layers start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.communication import Layout, build, count, differences, fake_ranks
from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.costs.communication import Collective, Gather, collectives, mhe_gather, sent_bytes
from tests.needs import causal_names
from tests.unit.model.costs.models import model_config

SPLIT_STYLES: list[tuple[dict[str, Any], int, torch.dtype]] = [
    ({"position": "learned", "max_position_embeddings": 16}, 8, torch.bfloat16),
    ({"position": "rope", "norm": "rmsnorm", "tie_embeddings": False, "vocab_size": 40}, 2, torch.float32),
    ({"position": "alibi", "activation": "swiglu", "bias": False, "tie_embeddings": False}, 4, torch.float64),
]


def split_config(attention: str | tuple[str, ...], **changes: Any) -> ModelConfig:
    """Shards over 2, 4 and 8 ranks; a vocabulary that none of them divides."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "head_dim": 8, "ffn_hidden_size": 48, "vocab_size": 37}
    sizes |= {"head_dim": 16} if attention == "gta" else {}  # 8 ranks share the half of a key that all heads have
    return model_config(attention, **{**sizes, **changes})


def check_collectives(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> None:
    """With values, which are quicker than fake tensors where they are so few; those are counted with in tests/dist."""
    sizes = 3, 8  # sequences, tokens
    expected = collectives(config, layout.tensor, layout.sequence, layout.way, *sizes, dtype.itemsize)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where megatron-core makes its buffers
    with fake_ranks(layout.tensor) as group, device:
        found = count(build(config, layout, group, dtype), torch.zeros(sizes, dtype=torch.long))
    assert differences(found, expected) == []


@pytest.mark.parametrize("name", causal_names())
@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_are_those_of_every_option(name: str, sequence: bool) -> None:
    ways: tuple[Gather, ...] = (
        ("weights", "activations") if attention_variant(name).of_kind(split_config(name), "shared") else ("weights",)
    )
    for number, gather in enumerate(ways, causal_names().index(name) + sequence):  # styles take turns
        style, tensor, dtype = SPLIT_STYLES[number % len(SPLIT_STYLES)]
        check_collectives(split_config(name, **style), Layout(tensor, sequence, gather), dtype)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gqa", {"num_kv_heads": 4}),
        ("gqa", {"num_kv_heads": 8}),
        ("mhe_add", {"key_embedding": False}),
        ("mhe_add", {"attention_kernel": "shared_scores"}),
        ("mhe_add", {"num_seeds": 2}),
        ("mhe_mul", {"num_seeds": 4}),
        ("sha", {"num_seeds": 8}),
        ("mhe_low_rank", {"num_seeds": 2, "qk_norm": True}),
        ("mhe_mul", {"position": "rope", "embedding_position": "before"}),
        ("mha", {"num_layers": 1, "head_dim": 4, "norm": "rmsnorm", "bias": False}),
        ("mha", {"attend_across_documents": False, "end_of_document": 3}),
        (("mhe_add", "gqa"), {"num_kv_heads": 2, "num_layers": 3}),
        (("mha", "mhe_mul"), {"qk_norm": True}),
        ("gqa", {"qk_norm": True}),
        ("mhe_add", {"qk_norm": True}),
        ("el", {"output_gate": "elementwise"}),
        ("mhe_mul", {"output_gate": "head"}),
        ("mha", {"attention_sinks": True}),
        ("mhe_add", {"attention_sinks": True, "logit_softcap": 3.0}),
    ],
)
@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_with_fields_of_single_variants(
    name: str | tuple[str, ...], changes: dict[str, Any], sequence: bool
) -> None:
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
def test_what_is_gathered_sends_less_in_the_full_model(sequence: bool, tokens: int) -> None:
    config = split_config("mhe_add")

    def sent(gather: Gather) -> float:
        return sum(sent_bytes(move, 8) for move in collectives(config, 8, sequence, gather, 1, tokens))

    other: Gather = "activations" if (chosen := mhe_gather(config, tokens, sequence)) == "weights" else "weights"
    assert sent(chosen) < sent(other)


@pytest.mark.parametrize("heads", [64, 128])
def test_shares_of_mha(heads: int) -> None:
    """MHA sums the hidden state four times per layer; MHE sums it three times, and its outputs, 3/n as wide, once.

    With sequence parallelism MHA moves the hidden state ten times; MHE moves it seven times and its outputs twice.
    """

    def sent(name: str, sequence: bool) -> float:
        config = split_config(name, hidden_size=64 * heads, num_heads=heads, head_dim=64, num_layers=1)
        moves = collectives(config, 8, sequence, "weights", micro_batch_size=1024, sequence_length=4096)
        return sum(sent_bytes(move, 8) for move in moves if move.part in ("attention", "mlp"))

    assert sent("mhe_add", False) / sent("mha", False) == pytest.approx((3 + 3 / heads) / 4, rel=1e-4)
    assert sent("mhe_add", True) / sent("mha", True) == pytest.approx((7 + 2 * 3 / heads) / 10, rel=1e-4)
