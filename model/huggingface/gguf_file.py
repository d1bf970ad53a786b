"""A model's stock form as a GGUF file for llama.cpp, in float32, with one tensor in memory at a time.

What llama.cpp computes, from its sources and measured by tests/unit/model/huggingface/test_gguf_file.py:

- Rotary positions. Its `llama` rotates pairs of neighbouring channels, so rows of queries and keys are interleaved within each
  head; its `starcoder2` pairs channel c with c + head_dim/2, as we do.
- GELU. Ours is exact, x Φ(x). All of its architectures used here except `llama`, which has SiLU, use the tanh approximation,
  within 5e-4 of ours; its CPU backend reads it from a table in float16. Greedy tokens differ only where logits nearly tie.
- ALiBi's slopes equal ours for any number of heads.
- Attention is float32 with --flash-attn off --cache-type-k f32 --cache-type-v f32. By default keys and values are cached in
  float16, and flash attention rounds, too.
- A text's ids equal ours, after one end-of-document token. It is the file's BOS, which llama.cpp prepends, because documents
  follow it in training. In a prompt, llama.cpp reads the characters <|endoftext|> as that token; our tokenizer reads text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.huggingface.fold import Make, Read
from model.huggingface.stock import Shape, StockArchitecture, tensor_sizes

NORMAL, CONTROL, UNUSED = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED
# Fields of a tokenizer's model that llama.cpp's BPE does not support: null or false in GPT-2's.
FOREIGN_FIELDS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "unk_token")


@dataclass(frozen=True)
class _Architecture:
    """llama.cpp's name of an architecture, and of transformers' modules outside and inside the list of layers."""

    name: str
    outside: dict[str, str]
    inside: dict[str, str]
    transposed: tuple[str, ...] = ()  # parts of a layer that transformers stores as (in, out)
    rotary: bool = False
    alibi: bool = False
    interleaved: tuple[str, ...] = ()  # parts for which llama.cpp expects the two halves of a head's rows interleaved


_GPT = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GPT_OUTSIDE = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
_ROPE_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_ROPE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_LLAMA = _ROPE | {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_STARCODER2 = _ROPE | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_MPT_OUTSIDE = {"transformer.wte": "token_embd", "transformer.norm_f": "output_norm"}
_MPT = {
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}
_ARCHITECTURES = {
    "gpt_bigcode": _Architecture("starcoder", _GPT_OUTSIDE, _GPT),
    "gpt2": _Architecture("gpt2", _GPT_OUTSIDE, _GPT, transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "llama": _Architecture("llama", _ROPE_OUTSIDE, _LLAMA, rotary=True, interleaved=("self_attn.q_proj", "self_attn.k_proj")),
    "starcoder2": _Architecture("starcoder2", _ROPE_OUTSIDE, _STARCODER2, rotary=True),
    "mpt": _Architecture("mpt", _MPT_OUTSIDE, _MPT, alibi=True),
}


def gguf_refusal(stock: StockArchitecture) -> str | None:
    """Why llama.cpp cannot run this architecture; None if it can."""
    if stock.name in _ARCHITECTURES:
        return None
    return f"llama.cpp has no architecture for {stock.name}; it has {', '.join(_ARCHITECTURES)}"


def write_gguf(
    path: Path,
    stock: StockArchitecture,
    config: ModelConfig,
    shape: Shape,
    read: Read,
    tokenizer_json: str,
    end_of_document: int,
    name: str,
) -> None:
    """Write the model of `stock.tensors(config, read, shape)` to `path`, with its tokenizer, under `name`.

    Shapes are computed first, on the meta device; then each tensor is made and written. UserError: `gguf_refusal`, heads of
    one channel, or a tokenizer that llama.cpp does not support.
    """
    refusal = gguf_refusal(stock)
    if refusal is None and config.head_width == 1:
        refusal = "llama.cpp cannot run heads of one channel (head_dim 1): at least 2"
    if refusal is not None:
        raise UserError(refusal)
    architecture = _ARCHITECTURES[stock.name]
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        _add_sizes(writer, architecture, config, shape)
        _add_tokenizer(writer, tokenizer_json, shape.vocab_size, end_of_document)
        sizes = tensor_sizes(config, lambda read: _tensors(architecture, stock, config, shape, read))
        for tensor_name, size in sizes.items():
            writer.add_tensor_info(tensor_name, size, np.dtype(np.float32), 4 * size.numel())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, make in _tensors(architecture, stock, config, shape, read):
            writer.write_tensor_data(make().float().contiguous().numpy())
    finally:
        writer.close()


def read_gguf(path: Path, stock: StockArchitecture, config: ModelConfig, names: Iterable[str]) -> dict[str, Make]:
    """Functions that read the tensors `names`, in transformers' layout, from a file of `write_gguf`."""
    architecture = _ARCHITECTURES[stock.name]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name in names:
        place, part = _place(architecture, stock, name)
        found[name] = _arranged(architecture, part, config, partial(_copied, stored[place]), _deinterleaved)
    return found


def _copied(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(tensor.data))


def _tensors(
    architecture: _Architecture, stock: StockArchitecture, config: ModelConfig, shape: Shape, read: Read
) -> Iterator[tuple[str, Make]]:
    """Every tensor under llama.cpp's name, in llama.cpp's layout."""
    for name, make in stock.tensors(config, read, shape):
        place, part = _place(architecture, stock, name)
        yield place, _arranged(architecture, part, config, make, _interleaved)


def _place(architecture: _Architecture, stock: StockArchitecture, name: str) -> tuple[str, str]:
    """llama.cpp's name of a transformers tensor, and which part of a layer it is, "" outside the layers."""
    path, _, kind = name.rpartition(".")
    if path == "lm_head":
        return f"output.{kind}", ""
    if not path.startswith(f"{stock.blocks}."):
        return f"{architecture.outside[path]}.{kind}", ""
    number, _, part = path.removeprefix(f"{stock.blocks}.").partition(".")
    return f"blk.{number}.{architecture.inside[part]}.{kind}", part


def _arranged(
    architecture: _Architecture, part: str, config: ModelConfig, make: Make, reorder: Callable[[Tensor, int], Tensor]
) -> Make:
    """A tensor converted between transformers' layout and llama.cpp's; `reorder` is `_interleaved` or its inverse."""
    if part in architecture.transposed:
        return lambda: _transposed(make())
    if part in architecture.interleaved:
        return lambda: reorder(make(), config.head_width)
    return make


def _transposed(tensor: Tensor) -> Tensor:
    """Transpose a matrix; a bias is unchanged."""
    return tensor.T if tensor.dim() == 2 else tensor


def _interleaved(rows: Tensor, head_width: int) -> Tensor:
    """Reorder rows 0, 1 … of each head (weight or bias) to 0, D/2, 1, D/2 + 1 …, so that neighbours form a rotary pair."""
    return rows.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)


def _deinterleaved(rows: Tensor, head_width: int) -> Tensor:
    """The inverse of `_interleaved`."""
    return rows.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _add_sizes(writer: gguf.GGUFWriter, architecture: _Architecture, config: ModelConfig, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon)
    if architecture.rotary:
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_theta)
    if architecture.alibi:
        writer.add_max_alibi_bias(8.0)  # the smallest slope is 2^-8


def _add_tokenizer(writer: gguf.GGUFWriter, text: str, vocab_size: int, end_of_document: int) -> None:
    tree = json.loads(text)
    _check_tokenizer(tree)
    tokens, kinds = [f"[PAD{number}]" for number in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in tree["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for added in tree["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in tree["model"]["merges"]])
    writer.add_bos_token_id(end_of_document)
    writer.add_eos_token_id(end_of_document)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _check_tokenizer(tree: dict[str, Any]) -> None:
    """UserError unless llama.cpp gives the same ids when it treats this as a GPT-2 tokenizer."""
    model, splitter, normalizer = tree["model"], tree.get("pre_tokenizer") or {}, tree.get("normalizer")
    faults = [f"model.{field}: {model[field]!r}" for field in FOREIGN_FIELDS if model.get(field)]
    if model["type"] != "BPE":
        faults.append(f"model.type: {model['type']}")
    if splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space", True) or not splitter.get("use_regex", True):
        faults.append(f"pre_tokenizer: {json.dumps(splitter)}")
    if normalizer is not None:
        faults.append(f"normalizer: {normalizer['type']}")
    faults += [f"added_tokens: {added['content']!r} is not special" for added in tree["added_tokens"] if not added["special"]]
    if faults:
        raise UserError(
            f"tokenizer.json: {faults[0]}: llama.cpp may not support it; a GGUF file needs a byte-level BPE that splits text "
            "as GPT-2 does (ByteLevel with add_prefix_space false, no normalizer), as trained by launch/prepare.py"
        )
