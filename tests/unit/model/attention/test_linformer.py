"""Linformer against its formula, its costs against a real model, and what it must refuse. The kind of model is not causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.communication import Layout
from configs.schema import DataConfig, Fault, ModelConfig
from configs.schema.rules import cross_faults
from model import registry
from model.attention.cache import LayerCache
from model.attention.registry import variant_of
from model.costs.flops import executed_flops_per_token, flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.decoder import DecoderLM
from model.faults import model_faults
from model.initialization import init_weights
from model.layers import Layers
from model.positions.masks import AttentionMask
from tests import reference
from tests.bidirectional import BIDIRECTIONAL, KIND
from tests.helpers import losses_of
from tests.unit.model.attention.layers import BATCH, LENGTH, assert_equals_formula, hidden, layer_of, positions_of
from tests.unit.model.attention.test_kernels import Operations
from tests.unit.model.attention.test_variants import PADDING
from tests.unit.model.costs.test_communication import check_collectives, split_config

LINFORMER: dict[str, Any] = {"attention": "linformer", "kind": BIDIRECTIONAL, "linformer_length": 3, "linformer_tokens": 9}
BLANK = torch.tensor([[True] * 7, [False] * 7])  # a sequence of padding only
MASKS = {"none": None, "padding": PADDING, "blank": BLANK}


@pytest.fixture(autouse=True)
def bidirectional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS, BIDIRECTIONAL, KIND)


def model_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "hidden_size": 10,
        "num_layers": 2,
        "num_heads": 6,
        "head_dim": 4,
        "vocab_size": 11,
        "position": "none",
    }
    return ModelConfig(**fields | LINFORMER | changes)


CASES: list[dict[str, Any]] = [
    {"bias": False},
    {"position": "rope", "qk_norm": True},
    {"position": "rope", "num_heads": 3, "head_dim": 6, "output_gate": "head"},
    {"linformer_length": 1, "linformer_tokens": 7, "head_dim": 5},
]


@pytest.mark.parametrize("valid_BT", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_equals_its_formula_with_every_kernel(changes: dict[str, Any], valid_BT: Tensor | None) -> None:
    """Outputs and all gradients; a sequence of 7 tokens reads the first columns of E and F."""
    config = model_config(**changes)
    assert not model_faults({"model": config})
    assert_equals_formula(config, AttentionMask(causal=False, valid_BT=valid_BT), variant_of(config).kernels)


def test_padding_changes_nothing_beside_it() -> None:
    config = model_config(position="rope")
    layer, x_SBH = layer_of(config), hidden(config)
    alone_SBH = layer(x_SBH[:4], positions_of(config, 4, mask=AttentionMask(causal=False)))
    valid_BT = (torch.arange(LENGTH) < 4).expand(BATCH, -1)
    padded_SBH = layer(x_SBH, positions_of(config, mask=AttentionMask(causal=False, valid_BT=valid_BT)))
    torch.testing.assert_close(padded_SBH[:4], alone_SBH, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_model_equals_the_reference(monkeypatch: pytest.MonkeyPatch, position: str) -> None:
    """All layers, with gradients; mixed with another variant."""
    longest = 9 if position == "learned" else None
    config = model_config(attention=("linformer", "mha"), position=position, max_position_embeddings=longest)
    assert not model_faults({"model": config})
    model = DecoderLM(config).double()
    init_weights(model, seed=3)
    tokens_BS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(1))
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    attention = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *given, **options: attention(*given, **options, causal=False))
    expected_BSV, found_BSV = reference.logits(config, tokens_BS, weights), model.logits(tokens_BS)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-11)
    for logits_BSV in (expected_BSV, found_BSV):
        logits_BSV.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=0, atol=1e-9, msg=name)


def test_costs_are_those_of_a_real_model() -> None:
    """As torch counts them."""
    config, length = model_config(), 8
    with torch.device("meta"):
        model, tokens_BS = DecoderLM(config), torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.layers.losses(model(tokens_BS), tokens_BS).sum().backward()
    counted, pairs, columns = counter.get_total_flops(), length * 3, 6 * 4  # here nothing is masked
    assert flops_per_token(config, length) * length == counted
    executed = executed_flops_per_token(config, length, shares_scores=False) * length
    assert executed == counted + 2 * 2 * pairs * columns  # QKᵀ once more in the backward pass of each layer
    assert sum(parameters(config).values()) == sum(parameter.numel() for parameter in model.parameters())
    assert kv_cache_bytes_per_token(config) == 0


def test_work_grows_with_the_sequence_not_with_its_square() -> None:
    config = model_config(linformer_tokens=4096)
    assert flops_per_token(config, 64) == flops_per_token(config, 4096)
    square = config.model_copy(update={"attention": "mha", "linformer_length": None, "linformer_tokens": None})
    assert flops_per_token(square, 4096) > 10 * flops_per_token(square, 64)


@pytest.mark.parametrize("sequence", [False, True])
def test_collectives_are_those_of_the_formula(sequence: bool) -> None:
    config = split_config("linformer", kind=BIDIRECTIONAL)
    check_collectives(config, Layout(4, sequence, "weights"), torch.bfloat16)


def test_nothing_grows_with_sequences_times_e_nor_with_the_square() -> None:
    """E, of 64 × 512 values, is not copied for each of 8 heads of 4 sequences, and there are no scores of 512² pairs."""
    config = model_config(linformer_length=64, linformer_tokens=512, num_heads=8, head_dim=2, attention_kernel="sdpa")
    layer, x_SBH = layer_of(config, torch.float32), torch.randn(512, 4, 10)
    with Operations() as operations:
        layer(x_SBH, positions_of(config, 512, dtype=torch.float32, mask=AttentionMask(causal=False))).sum().backward()
    assert 64 * 512 <= operations.largest <= 3 * 4 * 512 * 8 * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"kind": "decoder"},
            "attention: in linformer a token sees later ones, which a decoder must not; take model.kind bidirectional",
        ),
        ({"attention": ("mha", "linformer"), "kind": "decoder"}, "attention: in linformer a token sees later ones"),
        (
            {"linformer_length": None},
            "linformer_length: linformer needs it: how many keys it projects a sequence to",
        ),
        ({"linformer_length": 10}, "linformer_length: at most linformer_tokens (9)"),
        (
            {"position": "alibi"},
            "position: linformer mixes the keys of all places, which leaves no distance",
        ),
        (
            {"attend_across_documents": False, "end_of_document": 3},
            "attend_across_documents: linformer mixes the keys of all tokens, so it cannot keep documents apart",
        ),
        ({"attention": "mha", "linformer_tokens": None}, "linformer_length: only linformer has it, not mha; set it to null"),
    ],
)
def test_what_it_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    (fault,) = model_faults({"model": model_config(**changes)})
    assert expected in f"{fault.key.removeprefix('model.')}: {fault.allowed}"


def test_without_another_kind_another_attention_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry._KINDS, BIDIRECTIONAL)
    (fault,) = model_faults({"model": model_config(kind="decoder")})
    assert str(fault.allowed).endswith("which a decoder must not; take another attention")


def data_faults(**model: Any) -> list[Fault]:
    data = DataConfig(path="-", sequence_length=16)
    sections: Mapping[str, Any] = {"model": model_config(**model), "data": data}
    return list(cross_faults(sections, world_size=1))


def test_lengths_that_do_not_fit_the_data() -> None:
    """E and F have a column for each token."""
    (longer,) = data_faults()
    assert (longer.key, longer.allowed) == ("data.sequence_length", "at most model.linformer_tokens (9)")
    (fewer,) = data_faults(linformer_tokens=None, linformer_length=17)
    assert (fewer.key, fewer.value) == ("model.linformer_length", 17)
    assert data_faults(linformer_tokens=None) == data_faults(linformer_tokens=16) == []


def test_packing_that_keeps_documents_apart_is_refused() -> None:
    data = DataConfig(path="-", sequence_length=8, packing="documents")
    (fault,) = model_faults({"model": model_config(), "data": data})
    assert fault.key == "model.attend_across_documents"
    assert "data.packing concatenate" in str(fault.allowed)


def test_no_pass_mixes_what_a_mask_keeps_apart() -> None:
    config = model_config()
    layer, x_SBH = layer_of(config), hidden(config)
    documents = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    for mask in (AttentionMask(), AttentionMask(causal=False, documents_BT=documents)):
        with pytest.raises(ValueError, match="neither a causal mask nor documents apart are possible"):
            layer(x_SBH, positions_of(config, mask=mask))
    cache = LayerCache(BATCH, variant_of(config).cached(config), LENGTH, x_SBH.dtype, x_SBH.device)
    unmasked = positions_of(config, mask=AttentionMask(causal=False))
    with pytest.raises(ValueError, match="linformer cannot generate"):
        layer(x_SBH, unmasked, cache)
    with pytest.raises(ValueError, match="12 tokens, but linformer_tokens is 9"):
        layer(hidden(config, 12), positions_of(config, 12, mask=AttentionMask(causal=False)))


def test_a_model_learns() -> None:
    """To copy the token that comes first in a sequence to all places, from a batch of both."""
    config, layers = model_config(num_layers=1, hidden_size=16, init_std=0.1), Layers()
    model = DecoderLM(config, layers)
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0)
    tokens_BS = torch.tensor([[1, 4, 4, 4, 4], [2, 4, 4, 4, 4]])
    labels_BS = tokens_BS[:, :1].expand(-1, 5)
    for _ in range(60):
        optimizer.zero_grad()
        losses_of(model, tokens_BS, labels_BS).mean().backward()
        optimizer.step()
    assert float(losses_of(model, tokens_BS, labels_BS).max().detach()) < 0.1
