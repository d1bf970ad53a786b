"""Stock architectures against our model: transformers computes the same logits and tokens from the folded weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.decoder import DecoderLM
from model.generation import generate
from model.huggingface.stock import Shape, find_stock
from model.huggingface.streamed import stock_logits
from model.initialization import init_weights
from tests.needs import causal_names, needs

VOCABULARY, LENGTH = 96, 40
SIZE = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "vocab_size": VOCABULARY + 32, "init_std": 0.15}
LEARNED = {"position": "learned", "max_position_embeddings": LENGTH}
BEFORE = {"position": "rope", "embedding_position": "before"}
NAMES = [name for name in causal_names() if attention_variant(name).stock is not None]
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "ffn_hidden_size": 80}
MPT = {"position": "alibi", "bias": False, "num_heads": 8}


def config_of(attention: str | tuple[str, ...], **fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({"attention": attention, **SIZE, **needs(attention), **fields})


def cases() -> dict[str, tuple[str, int, ModelConfig]]:
    """Name → stock architecture, its key/value heads, model."""
    found: dict[str, tuple[str, int, ModelConfig]] = {}
    for attention in NAMES:
        mhe = attention.startswith("mhe")
        heads = {"mha": 6, "skv": 6, "el": 6, "gqa": 2}.get(attention, 1)
        tied = {"tie_embeddings": attention != "gqa"}
        found[f"{attention} learned"] = (
            "gpt2" if heads > 1 else "gpt_bigcode",
            6 if heads > 1 else 1,
            config_of(attention, **LEARNED, **tied),
        )
        rotated = {**BEFORE, "key_embedding": False} if mhe else {"position": "rope"}
        found[f"{attention} llama"] = ("llama", heads, config_of(attention, **rotated, **LLAMA, **tied))
        found[f"{attention} llama, no biases"] = ("llama", heads, config_of(attention, **rotated, **LLAMA, bias=False))
        found[f"{attention} starcoder2"] = ("starcoder2", heads, config_of(attention, **rotated))
        if attention not in ("mhe_add", "mhe_low_rank"):  # their embeddings become biases
            found[f"{attention} mpt"] = ("mpt", 8, config_of(attention, **MPT))
        if mhe:
            found[f"{attention} llama, its own keys"] = ("llama", 6, config_of(attention, **BEFORE, **LLAMA))
    for attention in ("mhe_add", "mhe_mul", "mha", "gqa"):  # pruned models: 4 × 8 of 48
        pruned = {"num_heads": 4, "head_dim": 8}
        shared = attention.startswith("mhe")
        learned = ("gpt_bigcode", 1) if shared else ("gpt2", 6)
        found[f"{attention} learned, pruned"] = (*learned, config_of(attention, **LEARNED, **pruned))
        rotated = {**BEFORE, "key_embedding": False} if shared else {"position": "rope"}
        kept = {"mha": 4, "gqa": 2}.get(attention, 1)
        found[f"{attention} llama, pruned"] = ("llama", kept, config_of(attention, **rotated, **LLAMA, **pruned))
        found[f"{attention} starcoder2, pruned"] = ("starcoder2", kept, config_of(attention, **rotated, **pruned))
    found["mhe_add none"] = ("gpt_bigcode", 1, config_of("mhe_add", position="none", bias=False))
    found["mhe_mul wide heads"] = ("llama", 1, config_of("mhe_mul", **BEFORE, **LLAMA, key_embedding=False, head_dim=12))
    for attention in ("mhe_add", "mhe_mul"):
        fields = {**BEFORE, **LLAMA, "key_embedding": False, "num_seeds": 2}
        found[f"{attention} two seeds"] = ("llama", 2, config_of(attention, **fields))
        without = {"position": "rope", **LLAMA, "head_embeddings": False, "num_seeds": 3}
        found[f"{attention} without embeddings"] = ("llama", 3, config_of(attention, **without))
    mixed = {**BEFORE, **LLAMA, "key_embedding": False}
    found["a pattern"] = ("llama", 6, config_of(("mhe_add", "gqa"), **mixed, num_seeds=3))  # of 3 and 2 heads of keys
    found["sha two seeds"] = ("llama", 2, config_of("sha", position="rope", **LLAMA, num_seeds=2))
    for attention in ("mhe_add", "mhe_mul"):  # e^K stays with the one head's key
        found[f"{attention} one head"] = ("llama", 1, config_of(attention, **BEFORE, **LLAMA, num_heads=1, head_dim=8))
    return found


CASES = cases()


def random_model(config: ModelConfig) -> DecoderLM:
    """Every parameter far from zero and one, so that an omitted one would show."""
    model = DecoderLM(config)
    init_weights(model, 7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_ours(name: str) -> None:
    architecture, kv_heads, config = CASES[name]
    model, match = random_model(config), find_stock(config)
    assert match.stock is not None
    assert (match.stock.name, match.kv_heads) == (architecture, kv_heads)
    shape = Shape(VOCABULARY, LENGTH, match.heads, match.kv_heads)
    settings = AutoConfig.for_model(architecture, **match.stock.settings(config, shape))
    makes = dict(match.stock.tensors(config, model.get_parameter, shape))
    tokens_BS = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours_BSV = model.logits(tokens_BS)[..., :VOCABULARY]
    theirs_BSV = stock_logits(settings, match.stock.blocks, makes, tokens_BS, torch.float64)
    assert theirs_BSV.dtype == torch.float64
    tolerance = 1e-11 if match.stock.wide else 1e-5
    torch.testing.assert_close(theirs_BSV, ours_BSV, rtol=0, atol=tolerance * float(ours_BSV.abs().max()))

    loaded = AutoModelForCausalLM.from_config(settings)
    loaded.load_state_dict({key: make().float() for key, make in makes.items()}, strict=not config.tie_embeddings)
    loaded.tie_weights()
    cached = loaded.eval().generate(
        tokens_BS[:, :9], attention_mask=torch.ones(2, 9), max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    ours = torch.stack(list(generate(model, tokens_BS[:, :9], 16, temperature=0, vocab_size=VOCABULARY)), dim=1)
    assert cached[:, 9:].tolist() == ours.tolist()


def test_only_embeddings_after_the_rotation_fold_nowhere() -> None:
    positions = ("learned", "rope", "alibi", "none")
    without = set()
    for attention, position in itertools.product(NAMES, positions):
        learned = {"max_position_embeddings": 8} if position == "learned" else {}
        form = attention_variant(attention).stock
        assert form is not None
        if form.refusal(config_of(attention, position=position, **learned)):
            without.add((attention, position))
    assert without == {("mhe_add", "rope"), ("mhe_mul", "rope"), ("mhe_low_rank", "rope")}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": "mhe_add", "position": "rope"}, "embedding_position: before"),
        ({"attention": ("mha", "mhe_add"), "position": "rope"}, "embedding_position: before"),
        ({"attention": "tpa", "query_rank": 6, "key_rank": 2, "value_rank": 2}, "no stock model computes model.attention: tpa"),
        ({"attention": "mha", "position": "rope", **LLAMA, "qk_norm": True}, "model.qk_norm: true"),
        (
            {"attention": "mha", "position": "learned", "norm": "rmsnorm"},
            "no stock model has model.position: learned, model.norm: rmsnorm",
        ),
        ({"attention": "mha", **LEARNED, "head_dim": 10}, r"\(6 × 10\) must be at most hidden_size \(48\)"),
        ({"attention": "mha", **LEARNED, "head_dim": 12}, r"\(6 × 12\) must be at most hidden_size"),
        (
            {"attention": "mha", "position": "rope", **LLAMA, "num_heads": 5, "head_dim": 8},
            r"num_heads \(5\) must divide hidden_size \(48\) for llama",
        ),
        ({"attention": "mha", "position": "alibi"}, "powers of two only, not for num_heads 6"),
        ({"attention": "mhe_add", "position": "alibi", "num_heads": 8, "bias": False}, "has no biases"),
        ({"attention": "mha", "position": "alibi", "num_heads": 8}, "has no biases"),
        ({"attention": "mha", **MPT, "ffn_hidden_size": 100}, "4 × hidden_size wide, not 100"),
        (
            {"attention": "mha", **LEARNED, "attend_across_documents": False, "end_of_document": 0},
            "attend_across_documents: false",
        ),
        ({"attention": "mha", **LEARNED, "qk_norm": True}, r"norms queries and keys \(model.qk_norm: true\)"),
        ({"attention": "mha", **LEARNED, "sliding_window": 8}, r"has a sliding window \(model.sliding_window: 8\)"),
        ({"attention": "mha", "position": "rope", **LLAMA, "rope_fraction": 0.5}, "rotates some channels only"),
        ({"attention": "mha", "position": "rope", **LLAMA, "no_position_every": 2}, "has layers without positions"),
        ({"attention": "mha", **LEARNED, "attention_sinks": True}, "has attention sinks"),
        ({"attention": "mha", **LEARNED, "logit_softcap": 30.0}, r"caps scores \(model.logit_softcap: 30.0\)"),
        ({"attention": "mha", **LEARNED, "output_gate": "head"}, r"gates the outputs of heads \(model.output_gate: 'head'\)"),
    ],
)
def test_what_no_stock_model_computes(fields: dict[str, Any], reason: str) -> None:
    match = find_stock(ModelConfig(**{**SIZE, **fields}))
    assert match.stock is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(match.reason)
