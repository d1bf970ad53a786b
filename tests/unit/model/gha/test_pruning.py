"""Pruned models against unpruned ones whose other heads are zeroed, in float64; the paper's parameter counts from tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.registry import attention_class, attention_names, attention_variant
from model.costs.parameters import parameters
from model.decoder import DecoderLM
from model.faults import model_faults
from model.generation import generate
from model.gha.pruning import prune_config, prune_heads
from model.layers import UNSHARDED
from model.mlp import build_mlp
from tests.needs import needs

KEPT = ((0, 3, 4), (1, 2, 5))
NAMES = [name for name in attention_names() if attention_variant(name).maps]
EMBEDDED: list[dict[str, Any]] = [{"key_embedding": False}, {"position": "rope", "embedding_position": "before"}]
EMBEDDED += [{"num_seeds": 3}, {"num_seeds": 2}]
CASES = [
    pytest.param(name, {"bias": bias, **changes}, id="-".join([name, str(bias), *map(str, changes.values())]))
    for name in NAMES
    for bias in (True, False)
    for changes in [{"position": "learned"}, {"position": "rope"}, *(EMBEDDED if name.startswith("mhe") else [])]
]
CASES += [
    pytest.param("mha", {"output_gate": "elementwise", "qk_norm": True}, id="mha-elementwise"),
    pytest.param("mqa", {"attention_sinks": True}, id="mqa-sinks"),
    pytest.param("mhe_add", {"output_gate": "head", "position": "rope"}, id="mhe_add-head"),
]


def config_of(attention: str | tuple[str, ...], **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"attention": attention, "hidden_size": 20, "num_layers": 2, "num_heads": 6, "head_dim": 4}
    fields |= {"vocab_size": 23, **needs(attention)}
    config = ModelConfig(**{**fields, **changes})
    if config.position == "learned":
        config = config.model_copy(update={"max_position_embeddings": 12})
    assert not model_faults({"model": config})
    return config


def model_of(config: ModelConfig) -> DecoderLM:
    """Every parameter, biases and norms too, far from zero."""
    model = DecoderLM(config).double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model


def silenced(model: DecoderLM, kept: tuple[tuple[int, ...], ...]) -> DecoderLM:
    """The same model, with no contribution of the other heads to the residual stream."""
    config, copy = model.config, model_of(model.config)
    for layer, stay in enumerate(kept):
        columns_HND = copy.get_parameter(f"blocks.{layer}.attention.out.weight").data.view(
            config.hidden_size, config.num_heads, config.head_width
        )
        columns_HND[:, [head for head in range(config.num_heads) if head not in stay]] = 0
    return copy


def pruned(model: DecoderLM, kept: tuple[tuple[int, ...], ...]) -> DecoderLM:
    smaller = DecoderLM(prune_config(model.config, kept)).double().eval()
    smaller.load_state_dict(prune_heads(model.config, model.state_dict(), kept))
    return smaller


def assert_equal_models(found: DecoderLM, expected: DecoderLM) -> None:
    tokens_BS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 4, 4, 2, 0, 11, 3]])
    with torch.no_grad():
        logits_BSV = expected.logits(tokens_BS)
        torch.testing.assert_close(found.logits(tokens_BS), logits_BSV, atol=1e-10, rtol=0)
        assert logits_BSV.std() > 0.1
        cache = found.new_cache(2, 7)
        parts = [found.logits(tokens_BS[:, start:end], cache=cache) for start, end in ((0, 4), (4, 5), (5, 7))]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_BSV, atol=1e-10, rtol=0)
    texts = [torch.stack(list(generate(model, tokens_BS[:, :3], 6, seed=3))) for model in (found, expected)]
    assert torch.equal(*texts)


@pytest.mark.parametrize(("attention", "changes"), [*CASES, (("mha", "mhe_add"), {"qk_norm": True})])
def test_the_pruned_model_is_the_unpruned_one_with_the_others_silenced(
    attention: str | tuple[str, ...], changes: dict[str, Any]
) -> None:
    model = model_of(config_of(attention, **changes))
    smaller = pruned(model, KEPT)
    assert_equal_models(smaller, silenced(model, KEPT))
    assert smaller.config.num_heads == 3
    assert sum(p.numel() for p in smaller.parameters()) == sum(parameters(smaller.config).values())
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert not model_faults({"model": smaller.config})


# Of 6 heads, 0 to 2 read the first key/value head and 3 to 5 the second.
GROUPED = {
    "even": (((0, 2, 3, 4), (1, 2, 4, 5)), "gqa", 2),
    "one of each": (((0, 5), (2, 3)), "gqa", 2),
    "one unused": (((3, 4, 5), (0, 1, 2)), "gqa", 1),
    "uneven": (((0, 1, 5), (0, 3, 4)), "mha", None),
    "uneven between layers": (((0, 1), (0, 3)), "mha", None),
}


@pytest.mark.parametrize(("name", "field"), [("gla", "num_latents"), ("gta", "num_kv_heads")])
@pytest.mark.parametrize("case", GROUPED)
def test_shared_latents_and_tied_heads(name: str, field: str, case: str) -> None:
    """Where gqa becomes mha, each head gets its own copy: of its latent, with the width of a latent, or of its value."""
    kept, _, left = GROUPED[case]
    model = model_of(config_of(name, position="rope"))
    smaller = pruned(model, kept)
    assert getattr(smaller.config, field) == (left or len(kept[0]))
    assert smaller.config.latent_dim == (12 * smaller.config.num_latents if smaller.config.num_latents else None)
    assert_equal_models(smaller, silenced(model, kept))


@pytest.mark.parametrize("case", GROUPED)
def test_shared_keys_and_values(case: str) -> None:
    kept, attention, kv_heads = GROUPED[case]
    model = model_of(config_of("gqa", position="rope"))
    smaller = pruned(model, kept)
    assert (smaller.config.attention, smaller.config.num_kv_heads) == (attention, kv_heads)
    assert_equal_models(smaller, silenced(model, kept))


# Of 6 heads, 0 and 1 have the first of three seeds, 2 and 3 the second, 4 and 5 the third.
SEEDED = {
    "even": (((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)), 3),
    "one of each": (((0, 3, 5), (1, 2, 4)), 3),
    "one unused": (((0, 1, 4, 5), (2, 3, 4, 5)), 2),
    "uneven": (((0, 1, 5), (0, 3, 4)), 3),
    "uneven between layers": (((0, 1), (0, 3)), 2),
}


@pytest.mark.parametrize("case", SEEDED)
@pytest.mark.parametrize("attention", ["mhe_add", "mhe_mul"])
def test_seeds(attention: str, case: str) -> None:
    kept, seeds = SEEDED[case]
    model = model_of(config_of(attention, num_seeds=3, position="rope"))
    smaller = pruned(model, kept)
    assert smaller.config.num_seeds == seeds
    assert_equal_models(smaller, silenced(model, kept))


def test_moments_of_kept_heads_are_unchanged() -> None:
    """By the view (heads, width, …) of each tensor, whatever kind of tensor it is."""
    for attention in ("mha", "skv", "mhe_mul", "gqa"):
        config = config_of(attention)
        moments = {name: torch.rand_like(tensor) for name, tensor in model_of(config).state_dict().items()}
        found = prune_heads(config, moments, ((1, 4, 5), (0, 1, 5)))
        width, heads = config.head_width, config.num_heads
        for layer, stay in ((0, [1, 4, 5]), (1, [0, 1, 5])):
            prefix = f"blocks.{layer}.attention"
            expected: dict[str, Tensor] = {
                "out.weight": moments[f"{prefix}.out.weight"].view(-1, heads, width)[:, stay].flatten(1),
                "out.bias": moments[f"{prefix}.out.bias"],
            }
            if attention == "mhe_mul":
                expected |= {f"{e}_embedding": moments[f"{prefix}.{e}_embedding"][stay] for e in ("query", "key", "value")}
                expected |= {name: moments[f"{prefix}.{name}"] for name in ("qkv.weight", "qkv.bias")}
            else:
                kv_heads = {"mha": stay, "skv": stay, "gqa": [0, 1, 1] if layer == 0 else [0, 0, 1]}[attention]
                kv_width = width if attention == "skv" else 2 * width
                for name in ("weight", "bias"):
                    query, key_value = moments[f"{prefix}.query.{name}"], moments[f"{prefix}.key_value.{name}"]
                    expected[f"query.{name}"] = query.unflatten(0, (heads, width))[stay].flatten(0, 1)
                    expected[f"key_value.{name}"] = key_value.unflatten(0, (-1, kv_width))[kv_heads].flatten(0, 1)
            own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items() if f"{prefix}." in name}
            assert own.keys() == expected.keys()
            assert all(torch.equal(own[name], tensor) for name, tensor in expected.items()), attention
        others = [name for name in moments if ".attention." not in name]
        assert all(found[name] is moments[name] for name in others)


def test_all_heads_or_a_single_one() -> None:
    for attention in NAMES:
        model = model_of(config_of(attention))
        same = pruned(model, (tuple(range(6)),) * 2)
        assert same.config == model.config
        assert all(torch.equal(same.get_parameter(name), parameter) for name, parameter in model.named_parameters())
        assert_equal_models(pruned(model, ((5,), (2,))), silenced(model, ((5,), (2,))))


@pytest.mark.parametrize(
    ("changes", "kept", "expected"),
    [
        (
            {"attention": "sha"},
            KEPT,
            "'sha': the heads of sha cannot be told apart or pruned; only those of mha, gqa, mqa, skv, mhe_add",
        ),
        ({"attention": "el", "hidden_size": 24}, KEPT, "'el': the heads of el cannot be told apart or pruned"),
        ({"attention": ("mha", "sha")}, KEPT, "'sha': the heads of sha cannot be told apart"),
        ({"attention": ("mha", "gqa"), "num_kv_heads": 2}, KEPT, "mha, gqa: how much of gqa's keys and values stays"),
        ({"attention": "mha", "position": "alibi"}, KEPT, "slopes depend on their numbers"),
        ({"attention": "mha"}, ((0, 1), (0,)), r"different numbers of heads \(1, 2\)"),
    ],
)
def test_what_cannot_be_pruned_is_refused(changes: dict[str, Any], kept: Any, expected: str) -> None:
    config = config_of(**changes)
    with pytest.raises(UserError, match=expected):
        prune_config(config, kept)
    with pytest.raises(UserError, match=expected):
        prune_heads(config, {}, kept)


@pytest.mark.parametrize("kept", [((0, 1),), ((), ()), ((1, 0), (0, 1)), ((0, 0), (0, 1)), ((0, 6), (0, 1)), ((-1, 0), (0, 1))])
def test_heads_that_do_not_exist_raise(kept: Any) -> None:
    with pytest.raises(ValueError, match="heads of"):
        prune_config(config_of("mha"), kept)


def test_what_all_heads_share_stays() -> None:
    shared = {f"blocks.0.attention.{name}": torch.ones(4) for name in ("out.bias", "query_norm.weight")}
    assert prune_heads(config_of("mha", qk_norm=True), shared, KEPT) == shared


# ---- Figures of the paper (arXiv 2305.14380): parameters without embeddings, norms and biases, as integers.


def tensors_of(config: ModelConfig, attentions: int, mlps: int) -> dict[str, Tensor]:
    """Those of so many attention and MLP modules; on the meta device."""
    with torch.device("meta"):
        attention, mlp = attention_class(config)(config, UNSHARDED), build_mlp(config, UNSHARDED)
    tensors: dict[str, Tensor] = {}
    for count, kind, module in ((attentions, "attention", attention), (mlps, "mlp", mlp)):
        for number in range(count):
            tensors |= {f"blocks.{number}.{kind}.{name}": parameter for name, parameter in module.named_parameters()}
    return tensors


def count(tensors: dict[str, Tensor], kind: str = "") -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if kind in name)


@pytest.mark.parametrize(("ffn", "before", "after"), [(2048, 44_040_192, 29_884_416), (1024, 31_457_280, 17_301_504)])
def test_encoder_and_decoder_of_six_layers(ffn: int, before: int, after: int) -> None:
    """12 self-attention and 6 cross-attention modules, which have the same tensors; 2 of 8 heads are kept."""
    config = ModelConfig(attention="mha", hidden_size=512, num_layers=18, num_heads=8, ffn_hidden_size=ffn, bias=False)
    tensors = tensors_of(config, attentions=18, mlps=12)
    assert count(tensors) == before
    smaller = prune_heads(config, tensors, ((1, 6),) * 18)
    assert count(smaller) == after
    assert count(smaller, "blocks.7.attention") * 4 == count(tensors, "blocks.7.attention") == 4 * 512 * 512  # -75 %
    if ffn == 2048:
        assert f"{after / before - 1:.1%}" == "-32.1%"


def test_decoder_of_sixteen_layers() -> None:
    config = ModelConfig(attention="mha", hidden_size=1024, num_layers=16, num_heads=16, ffn_hidden_size=4096, bias=False)
    tensors = tensors_of(config, attentions=16, mlps=16)
    smaller = prune_heads(config, tensors, (tuple(range(0, 16, 2)),) * 16)
    assert (count(tensors), count(smaller)) == (201_326_592, 167_772_160)
