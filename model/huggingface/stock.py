"""Stock architectures: models of transformers that compute exactly what ours computes, and our weights under their names.

positions      norm, MLP            heads of keys and values     architecture
learned, none  layernorm, gelu      one                          gpt_bigcode, padded with heads of zeros
learned, none  layernorm, gelu      more (repeated up to all)    gpt2, padded likewise
rope           rmsnorm, swiglu      any                          llama
rope           layernorm, gelu      any                          starcoder2
alibi          layernorm, gelu      any (repeated up to all)     mpt, which has no biases
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.schema import ModelConfig
from configs.schema.base import as_yaml
from model.attention.registry import attention_names, attention_variant, layer_configs, layer_kinds, variant_of
from model.build import unsharded_shapes
from model.huggingface.fold import Affine, Make, Read, folded_attention
from model.positions.registry import position_kind

SWITCHES = {  # of all variants, that no stock architecture below has
    "qk_norm": "norms queries and keys",
    "output_gate": "gates the outputs of heads",
    "rope_fraction": "rotates some channels only",
    "no_position_every": "has layers without positions",
    "sliding_window": "has a sliding window",
    "attention_sinks": "has attention sinks",
    "logit_softcap": "caps scores",
}
Named = Iterator[tuple[str, Make]]


@dataclass(frozen=True)
class Shape:
    """What a stock configuration states beyond ours: rows of the vocabulary, longest sequence, heads."""

    vocab_size: int
    length: int
    heads: int
    kv_heads: int


class Layer:
    """One layer's parameters in float64."""

    def __init__(self, config: ModelConfig, read: Read, number: int, shape: Shape) -> None:
        self._config, self._read, self._prefix = config, read, f"blocks.{number}."
        layer = layer_configs(config)[number]
        self.attention = folded_attention(layer, lambda name: self(f"attention.{name}"), shape.heads, shape.kv_heads)

    def __call__(self, name: str) -> Tensor:
        return self._read(self._prefix + name)

    def affine(self, name: str) -> Affine:
        """A linear layer or norm, with a zero bias if it has none."""
        return affine(self._config, self, name)


def affine(config: ModelConfig, read: Read, name: str) -> Affine:
    weight = read(f"{name}.weight").double()
    return Affine(weight, read(f"{name}.bias").double() if config.bias else weight.new_zeros(weight.shape[0]))


@dataclass(frozen=True)
class StockArchitecture:
    """A stock architecture: its `model_type`, the models it can compute, its configuration and tensor names."""

    name: str
    positions: tuple[str, ...]
    norm: str
    activation: str
    settings: Callable[[ModelConfig, Shape], dict[str, Any]]
    embeddings: Callable[[ModelConfig, Read, Shape], Named]
    layer: Callable[[str, ModelConfig, Layer], Named]
    blocks: str  # the path of its list of layers
    kv_heads: Callable[[int, int], int] = lambda folded, heads: folded
    heads: Callable[[ModelConfig], int] = lambda config: config.num_heads
    refusal: Callable[[ModelConfig], str | None] = lambda config: None
    wide: bool = True  # whether it computes in float64 when its inputs are

    def tensors(self, config: ModelConfig, read: Read, shape: Shape) -> Named:
        """Each tensor's name and the function that makes it, in float64, from the model's parameters."""
        yield from self.embeddings(config, read, shape)
        for number in range(config.num_layers):
            layer = Layer(config, read, number, shape)
            yield from self.layer(f"{self.blocks}.{number}.", config, layer)


def tensor_sizes(config: ModelConfig, tensors: Callable[[Read], Named]) -> dict[str, torch.Size]:
    """The size of each of the `tensors` made from a model's parameters, computed on the meta device."""
    with torch.device("meta"):
        hollow = {name: torch.empty(shape) for name, shape in unsharded_shapes(config).items()}
        return {name: make().shape for name, make in tensors(hollow.__getitem__)}


@dataclass(frozen=True)
class Match:
    """A stock architecture for a model, or why there is none and what to change."""

    stock: StockArchitecture | None
    heads: int = 0
    kv_heads: int = 0
    reason: str = ""


def find_stock(config: ModelConfig) -> Match:
    """The stock architecture that computes exactly what a resolved model computes."""
    if refusal := _refusal(config):
        return _none(refusal)
    fitting = [stock for stock in STOCK_ARCHITECTURES if _fits(stock, config)]
    if not fitting:
        known = "; ".join(
            f"{' or '.join(stock.positions)} with {stock.norm} and {stock.activation}" for stock in STOCK_ARCHITECTURES
        )
        has = f"model.position: {config.position}, model.norm: {config.norm} and model.activation: {config.activation}"
        return _none(f"no stock model has {has}; known: {known}")
    forms = [(layer, variant_of(layer).stock) for layer in layer_kinds(config)]
    folded = math.lcm(*(form.kv_heads(layer) for layer, form in forms if form is not None))  # layers with fewer repeat theirs
    refusals = []
    for stock in fitting:
        heads = stock.heads(config)
        kv_heads = stock.kv_heads(folded, heads)
        refusal = stock.refusal(config)
        if refusal is None and kv_heads < folded:
            refusal = f"{stock.name} has {kv_heads} head of keys and values, not {folded}"
        if refusal is None:
            return Match(stock, heads, kv_heads)
        refusals.append(refusal)
    return _none(refusals[-1])


def _refusal(config: ModelConfig) -> str | None:
    """What no stock architecture has; None if the model has nothing of that kind."""
    for layer in layer_kinds(config):
        form = variant_of(layer).stock
        if form is None:
            return f"no stock model computes model.attention: {layer.attention}"
        if refusal := form.refusal(layer):
            return refusal
    switched = [
        f"{what} (model.{field}: {as_yaml(getattr(config, field))})"
        for field, what in SWITCHES.items()
        if config.changed(field)
    ]
    if switched:
        return f"no stock model of ours {', or '.join(switched)}"
    if config.separates_documents:
        return "no stock model keeps the documents of a sequence apart (model.attend_across_documents: false)"
    return None


def _none(reason: str) -> Match:
    return Match(None, reason=reason)


def _fits(stock: StockArchitecture, config: ModelConfig) -> bool:
    return config.position in stock.positions and (config.norm, config.activation) == (stock.norm, stock.activation)


def _filling_heads(config: ModelConfig) -> int:
    """The number of heads that together are as wide as the hidden state."""
    return config.hidden_size // config.head_width


def _gpt_refusal(config: ModelConfig) -> str | None:
    heads, width, hidden = config.num_heads, config.head_width, config.hidden_size
    if hidden % width or heads * width > hidden:
        return (
            f"num_heads × head_dim ({heads} × {width}) must be at most hidden_size ({hidden}), and head_dim must divide it, "
            "for gpt_bigcode and gpt2, which have learned positions"
        )
    return None


def _llama_refusal(config: ModelConfig) -> str | None:
    heads, hidden = config.num_heads, config.hidden_size
    return f"num_heads ({heads}) must divide hidden_size ({hidden}) for llama" if hidden % heads else None


def _mpt_refusal(config: ModelConfig) -> str | None:
    heads, width, hidden = config.num_heads, config.head_width, config.hidden_size
    if heads * width != hidden:
        return f"num_heads × head_dim ({heads} × {width}) must be hidden_size ({hidden}) for mpt"
    if config.num_heads & (config.num_heads - 1):
        return f"mpt has our slopes for powers of two only, not for num_heads {config.num_heads}"
    if _needs_bias(config):
        biased = " or ".join(name for name in attention_names() if (form := attention_variant(name).stock) and form.adds_biases)
        return f"mpt, which has our ALiBi, has no biases: train with model.bias: false and attention other than {biased}"
    if config.ffn_width != 4 * config.hidden_size:
        return f"mpt's MLP is 4 × hidden_size wide, not {config.ffn_width}"
    return None


def _words(config: ModelConfig, read: Read, shape: Shape, name: str) -> Named:
    yield name, lambda: read("token_embedding.weight")[: shape.vocab_size].double()
    if not config.tie_embeddings:
        yield "lm_head.weight", lambda: read("output.weight")[: shape.vocab_size].double()


def _position_table(config: ModelConfig, read: Read, shape: Shape) -> Tensor:
    if position_kind(config).has_table:
        return read("position_embedding.weight").double()
    return torch.zeros(shape.length, config.hidden_size, dtype=torch.float64)


def _pair(name: str, make: Callable[[], Affine], transposed: bool = False) -> Named:
    """A weight and a bias; `transposed` as in GPT-2's Conv1D."""
    yield f"{name}.weight", lambda: make().weight.T if transposed else make().weight
    yield f"{name}.bias", lambda: make().bias


def _joined(*parts: Callable[[], Affine]) -> Callable[[], Affine]:
    def make() -> Affine:
        made = [part() for part in parts]
        return Affine(torch.cat([part.weight for part in made]), torch.cat([part.bias for part in made]))

    return make


def _gpt_settings(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "n_positions": shape.length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": shape.heads,
        "n_inner": config.ffn_width,
        "activation_function": "gelu",
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_std,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _gpt_embeddings(config: ModelConfig, read: Read, shape: Shape) -> Named:
    yield from _words(config, read, shape, "transformer.wte.weight")
    yield "transformer.wpe.weight", lambda: _position_table(config, read, shape)
    yield from _pair("transformer.ln_f", lambda: affine(config, read, "final_norm"))


def _gpt_layer(prefix: str, layer: Layer, transposed: bool) -> Named:
    attention = layer.attention
    yield from _pair(f"{prefix}ln_1", lambda: layer.affine("attention_norm"))
    yield from _pair(f"{prefix}ln_2", lambda: layer.affine("mlp_norm"))
    yield from _pair(f"{prefix}attn.c_attn", _joined(attention.query, attention.key, attention.value), transposed)
    yield from _pair(f"{prefix}attn.c_proj", attention.output, transposed)
    yield from _pair(f"{prefix}mlp.c_fc", lambda: layer.affine("mlp.up"), transposed)
    yield from _pair(f"{prefix}mlp.c_proj", lambda: layer.affine("mlp.down"), transposed)


def _rope_settings(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.length,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": shape.heads,
        "head_dim": config.head_width,
        "num_key_value_heads": shape.kv_heads,
        "initializer_range": config.init_std,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama_settings(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    return _rope_settings(config, shape) | {
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": _needs_bias(config),
        "mlp_bias": config.bias,
    }


def _needs_bias(config: ModelConfig) -> bool:
    """Whether the stock form of its attention has biases."""
    forms = [variant_of(layer).stock for layer in layer_kinds(config)]  # `find_stock` refuses variants without one
    return config.bias or any(form is not None and form.adds_biases for form in forms)


def _llama_embeddings(config: ModelConfig, read: Read, shape: Shape) -> Named:
    yield from _words(config, read, shape, "model.embed_tokens.weight")
    yield "model.norm.weight", lambda: read("final_norm.weight").double()


def _llama_layer(prefix: str, config: ModelConfig, layer: Layer) -> Named:
    yield f"{prefix}input_layernorm.weight", lambda: layer("attention_norm.weight").double()
    yield f"{prefix}post_attention_layernorm.weight", lambda: layer("mlp_norm.weight").double()
    attention = _attention_projections(prefix, layer)
    yield from (pair for pair in attention if _needs_bias(config) or pair[0].endswith("weight"))
    for name in ("gate", "up", "down"):
        pairs = _pair(f"{prefix}mlp.{name}_proj", lambda name=name: layer.affine(f"mlp.{name}"))  # type: ignore[misc]
        yield from (pair for pair in pairs if config.bias or pair[0].endswith("weight"))


def _attention_projections(prefix: str, layer: Layer) -> Named:
    attention = layer.attention
    for name, make in (("q", attention.query), ("k", attention.key), ("v", attention.value), ("o", attention.output)):
        yield from _pair(f"{prefix}self_attn.{name}_proj", make)


def _starcoder2_settings(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    return _rope_settings(config, shape) | {
        "hidden_act": "gelu",
        "norm_epsilon": config.norm_epsilon,
        "use_bias": True,
        "residual_dropout": config.dropout,
        "embedding_dropout": config.dropout,
    }


def _starcoder2_embeddings(config: ModelConfig, read: Read, shape: Shape) -> Named:
    yield from _words(config, read, shape, "model.embed_tokens.weight")
    yield from _pair("model.norm", lambda: affine(config, read, "final_norm"))


def _starcoder2_layer(prefix: str, config: ModelConfig, layer: Layer) -> Named:
    yield from _pair(f"{prefix}input_layernorm", lambda: layer.affine("attention_norm"))
    yield from _pair(f"{prefix}post_attention_layernorm", lambda: layer.affine("mlp_norm"))
    yield from _attention_projections(prefix, layer)
    yield from _pair(f"{prefix}mlp.c_fc", lambda: layer.affine("mlp.up"))
    yield from _pair(f"{prefix}mlp.c_proj", lambda: layer.affine("mlp.down"))


def _mpt_settings(config: ModelConfig, shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "max_seq_len": shape.length,
        "d_model": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "expansion_ratio": 4,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.init_std,
        "learned_pos_emb": False,
        "use_cache": True,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _mpt_embeddings(config: ModelConfig, read: Read, shape: Shape) -> Named:
    yield from _words(config, read, shape, "transformer.wte.weight")
    yield "transformer.norm_f.weight", lambda: read("final_norm.weight").double()


def _mpt_layer(prefix: str, config: ModelConfig, layer: Layer) -> Named:
    attention = layer.attention
    yield f"{prefix}norm_1.weight", lambda: layer("attention_norm.weight").double()
    yield f"{prefix}norm_2.weight", lambda: layer("mlp_norm.weight").double()
    yield f"{prefix}attn.Wqkv.weight", lambda: _joined(attention.query, attention.key, attention.value)().weight
    yield f"{prefix}attn.out_proj.weight", lambda: attention.output().weight
    yield f"{prefix}ffn.up_proj.weight", lambda: layer("mlp.up.weight").double()
    yield f"{prefix}ffn.down_proj.weight", lambda: layer("mlp.down.weight").double()


def _all_heads(folded: int, heads: int) -> int:
    return heads


GPT_BIGCODE = StockArchitecture(
    "gpt_bigcode",
    ("learned", "none"),
    "layernorm",
    "gelu",
    lambda config, shape: _gpt_settings(config, shape) | {"multi_query": True},
    _gpt_embeddings,
    lambda prefix, config, layer: _gpt_layer(prefix, layer, transposed=False),
    "transformer.h",
    kv_heads=lambda folded, heads: 1,
    heads=_filling_heads,
    refusal=_gpt_refusal,
)
GPT2 = StockArchitecture(
    "gpt2",
    ("learned", "none"),
    "layernorm",
    "gelu",
    _gpt_settings,
    _gpt_embeddings,
    lambda prefix, config, layer: _gpt_layer(prefix, layer, transposed=True),
    "transformer.h",
    kv_heads=_all_heads,
    heads=_filling_heads,
    refusal=_gpt_refusal,
)
LLAMA = StockArchitecture(
    "llama",
    ("rope",),
    "rmsnorm",
    "swiglu",
    _llama_settings,
    _llama_embeddings,
    _llama_layer,
    "model.layers",
    refusal=_llama_refusal,
)
STARCODER2 = StockArchitecture(
    "starcoder2",
    ("rope",),
    "layernorm",
    "gelu",
    _starcoder2_settings,
    _starcoder2_embeddings,
    _starcoder2_layer,
    "model.layers",
)
MPT = StockArchitecture(
    "mpt",
    ("alibi",),
    "layernorm",
    "gelu",
    _mpt_settings,
    _mpt_embeddings,
    _mpt_layer,
    "transformer.blocks",
    kv_heads=_all_heads,
    refusal=_mpt_refusal,
    wide=False,
)
STOCK_ARCHITECTURES = (GPT_BIGCODE, GPT2, LLAMA, STARCODER2, MPT)
