"""The decoder against its reference, causality, cache, recomputation, initial weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.faults import attention_faults
from model.attention.registry import attention_variant
from model.block import Block
from model.decoder import DecoderLM
from model.faults import model_faults
from model.initialization import init_weights, initial_value
from model.layers import UNSHARDED
from tests import reference
from tests.helpers import losses_of, named
from tests.needs import causal_names, needs

NAMES = ["mha", "mqa", "gqa", "mhe_add", "mhe_mul"]
POSITIONS = [("learned", "after"), ("none", "after"), ("alibi", "after"), ("rope", "after"), ("rope", "before")]
CASES = [
    (name, position, embedding_position)
    for name in NAMES
    for position, embedding_position in POSITIONS
    if embedding_position == "after" or name.startswith("mhe")
]
STYLES: list[dict[str, Any]] = [
    {"activation": "swiglu", "norm": "rmsnorm", "bias": False, "tie_embeddings": False, "ffn_hidden_size": 13},
    {"activation": "gelu", "norm": "layernorm", "bias": True, "tie_embeddings": True},
    {"activation": "swiglu", "norm": "layernorm", "bias": False, "tie_embeddings": True, "ffn_hidden_size": 10},
    {"activation": "gelu", "norm": "rmsnorm", "bias": True, "tie_embeddings": False},
]


def model_config(attention: str | tuple[str, ...], **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"attention": attention, "hidden_size": 12, "num_heads": 4, "head_dim": 6}
    fields |= {"num_layers": 2 if isinstance(attention, str) else 5, "vocab_size": 17, "position": "learned"}
    fields |= {**needs(attention), **changes}
    return ModelConfig(**fields, max_position_embeddings=9 if fields["position"] == "learned" else None)


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float64, scale: float = 10, **options: Any) -> DecoderLM:
    """A model whose weights are large enough for attention to matter."""
    model = DecoderLM(config, **options).to(dtype)
    init_weights(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = initial_value(config, 4, name.replace("bias", "noise").replace("norm", "noise"), parameter.shape)
            parameter.add_(scale * noise)
    return model


def tokens(length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, 17, (2, length), generator=torch.Generator().manual_seed(seed))


def test_only_output_projections_of_attention_have_an_initial_scale() -> None:
    plain, small = (DecoderLM(model_config("mhe_add", attention_output_init_scale=scale)) for scale in (1.0, 0.25))
    init_weights(plain, seed=3)
    init_weights(small, seed=3)
    ratios = {
        name: (parameter.norm() / other.norm()).item()
        for (name, parameter), other in zip(small.named_parameters(), plain.parameters(), strict=True)
        if other.any()
    }
    assert {name for name in ratios if ratios[name] != 1} == {f"blocks.{number}.attention.out.weight" for number in (0, 1)}
    assert [ratios[name] for name in ratios if ratios[name] != 1] == pytest.approx([0.25] * 2)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("mhe_add", "learned"),
        ("mhe_mul", "rope"),
        ("mha", "alibi"),
        (("mhe_add", "mhe_add", "gqa"), "rope"),
        (("diff", "mhe_add"), "alibi"),
    ],
)
def test_losses_and_gradients_equal_the_reference(style: dict[str, Any], name: str | tuple[str, ...], position: str) -> None:
    config = model_config(name, position=position, **style)
    model, tokens_BS, labels_BS = model_of(config), tokens(7), tokens(7, seed=1)
    weights = {key: parameter.detach().clone().requires_grad_() for key, parameter in model.named_parameters()}
    expected_BSV = reference.logits(config, tokens_BS, weights)
    torch.testing.assert_close(model.logits(tokens_BS), expected_BSV, rtol=0, atol=1e-10)

    losses_BS, expected_BS = losses_of(model, tokens_BS, labels_BS), reference.losses(expected_BSV, labels_BS)
    torch.testing.assert_close(losses_BS, expected_BS, rtol=0, atol=1e-10)
    losses_BS.sum().backward()
    expected_BS.sum().backward()
    for key, parameter in model.named_parameters():
        expected = weights[key].grad if weights[key].grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-10, msg=key)


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("mhe_mul", {"position": "rope", "embedding_position": "before", "no_position_every": 2, "rope_fraction": 1 / 3}),
    ("sha", {"position": "alibi", "no_position_every": 2}),
    ("mhe_add", {"position": "rope", "sliding_window": 3, "full_attention_every": 2}),
    ("gqa", {"position": "rope", "sliding_window": 4, "full_attention_every": 3, "no_position_every": 3, "num_layers": 3}),
]


@pytest.mark.parametrize(("name", "changes"), LAYERS)
def test_layers_that_differ_by_their_number(name: str, changes: dict[str, Any]) -> None:
    """Against the reference in one pass, and through the cache."""
    config = model_config(name, **changes)
    assert not model_faults({"model": config})
    model, tokens_BS = model_of(config), tokens()
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    expected_BSV = reference.logits(config, tokens_BS, weights)
    torch.testing.assert_close(model.logits(tokens_BS), expected_BSV, rtol=0, atol=1e-10)
    cache = model.new_cache(batch_size=2, capacity=9)
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens_BS.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BSV, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "position", "embedding_position"), CASES)
def test_a_token_changes_nothing_before_it(name: str, position: str, embedding_position: str) -> None:
    model = model_of(model_config(name, position=position, embedding_position=embedding_position))
    tokens_BS = tokens()
    changed_BS = tokens_BS.clone()
    changed_BS[:, 5] = (changed_BS[:, 5] + 1) % 17
    difference = (model.logits(tokens_BS) - model.logits(changed_BS)).abs().amax(dim=(0, 2))
    assert difference[:5].max() < 1e-13
    assert difference[5:].min() > 1e-6


@pytest.mark.parametrize(("name", "position", "embedding_position"), CASES)
def test_cached_passes_equal_one_pass(name: str, position: str, embedding_position: str) -> None:
    config = model_config(name, position=position, embedding_position=embedding_position)
    model, tokens_BS = model_of(config), tokens()
    cache = model.new_cache(batch_size=2, capacity=9)
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens_BS.split([4, 1, 3, 1], dim=1)]
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(tokens_BS), rtol=0, atol=1e-11)
    heads = {"mha": 4, "gqa": 2}.get(name, 1)
    assert all(layer.k_BKSD.shape == layer.v_BKSD.shape == (2, heads, 9, 6) for layer in cache.layers)


def test_layers_of_a_pattern_cache_what_their_attention_keeps() -> None:
    config = model_config(("mhe_add", "gqa"), position="rope", num_seeds=4)
    model, tokens_BS = model_of(config), tokens()
    cache = model.new_cache(batch_size=2, capacity=9)
    with torch.no_grad():
        parts = [model.logits(part, cache=cache) for part in tokens_BS.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(tokens_BS), rtol=0, atol=1e-11)
    assert [layer.k_BKSD.shape[1] for layer in cache.layers] == [4, 2, 4, 2, 4]


def test_a_cache_grows_with_its_tokens() -> None:
    model = model_of(model_config("mhe_add", position="rope"))
    cache, lengths, moved = model.new_cache(batch_size=2, capacity=10**12), [], 0
    with torch.no_grad():
        for tokens_BS in torch.randint(0, 17, (100, 2, 1)):
            before = cache.layers[0].k_BKSD
            model.logits(tokens_BS, cache=cache)
            moved += before is not cache.layers[0].k_BKSD
            lengths.append(cache.layers[0].k_BKSD.shape[2])
    assert all(tokens_in <= length <= 2 * tokens_in for tokens_in, length in enumerate(lengths, 1))
    assert moved <= 8


@pytest.mark.parametrize("style", STYLES)
def test_logits_of_the_last_token_alone(style: dict[str, Any]) -> None:
    model, tokens_BS = model_of(model_config("mhe_mul", **style)), tokens()
    normed: list[int] = []
    model.final_norm.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0].shape[0]))
    last_BSV = model.logits(tokens_BS, cache=model.new_cache(2, 9), last_only=True)
    assert normed == [1]
    torch.testing.assert_close(last_BSV, model.logits(tokens_BS)[:, -1:], rtol=0, atol=1e-12)


def test_positions_matter_unless_there_are_none() -> None:
    for position in ("learned", "rope", "alibi", "none"):
        model = model_of(model_config("mhe_add", position=position))
        tokens_BS = tokens()
        swapped_BS = tokens_BS[:, [1, 0, *range(2, 9)]]
        moved = (model.logits(tokens_BS) - model.logits(swapped_BS)).abs()[:, -1].max()
        # Two layers of causal attention tell orders apart even without positions; one does not.
        one_layer = model_of(model_config("mhe_add", position=position, num_layers=1))
        assert moved > 1e-6
        assert ((one_layer.logits(tokens_BS) - one_layer.logits(swapped_BS)).abs()[:, -1].max() > 1e-6) == (position != "none")


def test_too_long_a_sequence_names_the_limit() -> None:
    with pytest.raises(ValueError, match="10 tokens, but max_position_embeddings is 9"):
        model_of(model_config("mha")).logits(tokens(10))
    model = model_of(model_config("mha", position="none"))
    with pytest.raises(ValueError, match="the cache holds 3 tokens, not 4"):
        model.logits(tokens(4), cache=model.new_cache(2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_changes_neither_loss_nor_gradient(name: str) -> None:
    config, results = model_config(name, dropout=0.3), []
    for recompute in (False, True):
        model = model_of(config, recompute_activations=recompute)
        calls = count_calls(model.blocks[0])
        torch.manual_seed(8)
        losses_BS = losses_of(model, tokens(), tokens(seed=1))
        losses_BS.sum().backward()
        assert calls == [1] * (2 if recompute else 1)
        results.append((losses_BS, {key: parameter.grad for key, parameter in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for key, grad in results[0][1].items():
        assert grad is not None
        torch.testing.assert_close(grad, results[1][1][key], rtol=0, atol=0, msg=key)


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_dropout_of_embeddings_attention_and_mlp_only_while_training() -> None:
    model = model_of(model_config("mhe_mul", dropout=0.5))
    block = model.blocks[0]
    assert isinstance(block, Block)
    embeddings, residuals = count_calls(model.dropout), count_calls(block.dropout)
    model.logits(tokens())
    assert (len(embeddings), len(residuals)) == (1, 2)
    assert not torch.equal(model.logits(tokens()), model.logits(tokens()))
    model.eval()
    assert torch.equal(model.logits(tokens()), model.logits(tokens()))


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_and_float32_are_close_to_float64(name: str, position: str) -> None:
    config = model_config(name, position=position)
    exact = losses_of(model_of(config, scale=1), tokens(), tokens(seed=1))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        losses_BS = losses_of(model_of(config, dtype, scale=1), tokens(), tokens(seed=1))
        assert losses_BS.dtype == torch.float32
        assert exact.dtype == torch.float64
        assert (losses_BS - exact).abs().max() < tolerance


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_initial_weights(name: str, style: dict[str, Any]) -> None:
    config = model_config(name, **style | {"hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 16, "init_std": 0.1})
    model = DecoderLM(config)
    init_weights(model, seed=1)
    drawn: dict[bytes, str] = {}
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), key
        elif "norm" in key:
            assert torch.equal(parameter, torch.ones_like(parameter)), key
        else:
            residual = key.endswith(("out.weight", "down.weight"))
            std = 0.1 / math.sqrt(2 * config.num_layers) if residual else 0.1
            assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel())), key
            start = parameter.detach().flatten()[:16].numpy().tobytes()
            assert start not in drawn, f"{key} starts like {drawn[start]}"
            drawn[start] = key


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = model_config("mhe_add")
    torch.manual_seed(1)
    first = DecoderLM(config)
    init_weights(first, seed=1)
    torch.manual_seed(2)
    other_order = DecoderLM(config)
    other_order.blocks = torch.nn.ModuleList(reversed([Block(config, UNSHARDED) for _ in range(2)]))
    state = torch.get_rng_state()
    init_weights(other_order, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    deeper = DecoderLM(config.model_copy(update={"num_layers": 3}))
    init_weights(deeper, seed=1)
    another = DecoderLM(config)
    init_weights(another, seed=2)
    for key, parameter in first.named_parameters():
        assert torch.equal(parameter, other_order.get_parameter(key))
        if not key.endswith(("bias", "norm.weight", "out.weight", "down.weight")):
            assert torch.equal(parameter, deeper.get_parameter(key))
            assert not torch.equal(parameter, another.get_parameter(key))


def test_an_unresolved_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        DecoderLM(model_config("mha").model_copy(update={"vocab_size": None}))


def apart_cases(name: str) -> Iterator[dict[str, Any]]:
    """Every position and kernel of a variant. Halves of a head, which RoPE turns in diff and gta, must be even."""
    fields: dict[str, Any] = {"attend_across_documents": False, "end_of_document": 5, "hidden_size": 24}
    fields["head_dim"] = 12 if name in ("diff", "gta") else 6
    for kernel in attention_variant(name).kernels:
        for position, embedding_position in POSITIONS:
            case = {**fields, "attention_kernel": kernel, "position": position, "embedding_position": embedding_position}
            if not list(attention_faults(model_config(name, **case))):
                yield case


@pytest.mark.parametrize("name", causal_names())
def test_documents_of_a_sample_are_as_if_alone(name: str) -> None:
    documents = [torch.tensor([[3, 1, 2, 5]]), torch.tensor([[5]]), torch.tensor([[4, 4, 0, 1]])]
    others = {"attend_across_documents": True, "end_of_document": None}
    cases = list(apart_cases(name))
    assert {case["position"] for case in cases} == {position for position, _ in POSITIONS}
    for case in cases:
        model = model_of(model_config(name, **case))
        together_BSV = model.logits(torch.cat(documents, dim=1))
        alone_BSV = torch.cat([model.logits(document) for document in documents], dim=1)
        torch.testing.assert_close(together_BSV, alone_BSV, rtol=0, atol=1e-11, msg=named(f"{case}"))
        across = model_of(model_config(name, **case | others))
        assert (across.logits(torch.cat(documents, dim=1)) - alone_BSV).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_documents_through_the_cache(position: str) -> None:
    config = model_config("mhe_add", position=position, attend_across_documents=False, end_of_document=5)
    model = model_of(config)
    tokens_BS = torch.tensor([[5, 1, 2, 5, 3, 4, 1], [1, 5, 5, 2, 3, 1, 5]])
    cache = model.new_cache(batch_size=2, capacity=7)
    with torch.no_grad():
        parts = [model.logits(part_BS, cache=cache) for part_BS in tokens_BS.split([3, 1, 2, 1], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(tokens_BS), rtol=0, atol=1e-11)


def test_an_unresolved_end_of_document_is_refused() -> None:
    with pytest.raises(ValueError, match="end_of_document is null"):
        DecoderLM(model_config("mhe_add", attend_across_documents=False))
