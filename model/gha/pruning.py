"""Cut heads out of a model: what belongs to a head leaves every tensor, the weights' and their moments' alike.

By the names in an attention module, in which head i of N with width D has

    query            rows [i·D, (i + 1)·D)
    key_value        rows of [k v], 2·D, of its key/value head; where keys are values (skv), D of its own
    query_embedding, key_embedding, value_embedding    row i
    out.weight       columns [i·D, (i + 1)·D)

What all heads share (the projection qkv, the output's bias) stays. The cut model's outputs are those of the whole one with the
other heads' columns of out.weight at zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.mhe import HEAD_EMBEDDINGS
from model.attention.registry import attention_names, attention_variant

Kept = Sequence[Sequence[int]]  # of each layer the heads that stay, ascending
_ATTENTION = re.compile(r"blocks\.(\d+)\.attention\.(.+)")


def cut_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The model that is left. UserError for one whose heads cannot be cut so.

    With gqa, key/value heads that nobody reads go, too; where kept heads share the others unevenly it becomes mha, in which
    every head has a copy of its own.
    """
    _check(config, kept)
    heads = len(kept[0])
    update: dict[str, object] = {"num_heads": heads, "head_dim": config.head_width}
    if config.num_kv_heads is not None:
        groups = _kv_heads_left(config, kept)
        update |= {"num_kv_heads": groups} if groups is not None else {"num_kv_heads": None, "attention": "mha"}
    return config.model_copy(update=update)


def cut_heads(config: ModelConfig, tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """`tensors` of the unpruned model by name → those of `cut_config`'s; what has no heads stays as it is."""
    cut = cut_config(config, kept)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _ATTENTION.fullmatch(name)
        out[name] = _cut(config, cut, found[2], tensor, kept[int(found[1])]) if found else tensor
    return out


def _cut(config: ModelConfig, cut: ModelConfig, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """One tensor of an attention module."""
    kind = name.removesuffix(".weight").removesuffix(".bias")
    if kind == "qkv" or name == "out.bias":
        return tensor
    if name == "out.weight":
        return _pick(tensor, kept, config.head_width, dim=1)
    if kind in HEAD_EMBEDDINGS:
        return _pick(tensor, kept, 1)
    if kind == "query":
        return _pick(tensor, kept, config.head_width)
    if kind == "key_value":
        before, after = (attention_variant(c.attention).key_value_heads(c) for c in (config, cut))
        if before == 0:
            return _pick(tensor, kept, config.head_width)
        read = [head * before // config.num_heads for head in kept]
        return _pick(tensor, read if after == len(kept) else sorted(set(read)), 2 * config.head_width)
    raise ValueError(f"{name}: no tensor of an attention module whose heads can be cut")


def _pick(tensor: Tensor, blocks: Sequence[int], width: int, dim: int = 0) -> Tensor:
    """The numbered blocks of `width` rows (or columns) one behind the other."""
    index = [block * width + offset for block in blocks for offset in range(width)]
    return tensor[index] if dim == 0 else tensor[:, index]


def _kv_heads_left(config: ModelConfig, kept: Kept) -> int | None:
    """How many key/value heads gqa keeps; None unless as many kept heads read each of them, in all layers."""
    assert config.num_kv_heads is not None
    sharing = config.num_heads // config.num_kv_heads
    sizes = set()
    for of_layer in kept:
        read = [head // sharing for head in of_layer]
        sizes |= {read.count(kv_head) for kv_head in read}
    return len(kept[0]) // sizes.pop() if len(sizes) == 1 else None


def _check(config: ModelConfig, kept: Kept) -> None:
    if not attention_variant(config.attention).maps:
        able = ", ".join(name for name in attention_names() if attention_variant(name).maps)
        raise UserError(f"model.attention = {config.attention!r}: its heads cannot be told apart or cut; only those of {able}")
    if config.position == "alibi":
        raise UserError("model.position = 'alibi': heads cannot be cut, since their slopes follow from their numbers")
    counts = {len(of_layer) for of_layer in kept}
    if len(counts) != 1:
        raise UserError(f"layers would keep different numbers of heads ({', '.join(map(str, sorted(counts)))})")
    if len(kept) != config.num_layers or counts == {0}:
        raise ValueError(f"heads of {len(kept)} layers, the model has {config.num_layers}")
    for of_layer in kept:
        if list(of_layer) != sorted({*of_layer}) or not 0 <= of_layer[0] <= of_layer[-1] < config.num_heads:
            raise ValueError(f"{list(of_layer)} are no ascending heads of {config.num_heads}")
