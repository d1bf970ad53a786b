"""Prune heads of a model: remove each pruned head's slice from every tensor, weights, averages and optimizer moments alike.

In an attention module, head i of N with width D has these slices:

    query            rows [i·D, (i + 1)·D)
    key_value, qkv   the block of rows that it reads, as its variant's `Pruning` declares
    out.weight       columns [i·D, (i + 1)·D)
    parameters of the module itself (head embeddings)    row i

What all heads share (the output's bias) stays. The pruned model's outputs equal those of the unpruned
model with the pruned heads' columns of out.weight set to zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.attention.variant import Kept, Pruning
from model.gha.faults import unprunable
from model.positions.registry import position_kind

_ATTENTION = re.compile(r"blocks\.(\d+)\.attention\.(.+)")


def prune_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The configuration of the model with the `kept` heads. UserError if its heads cannot be pruned like this.

    With gqa, key/value heads that no kept head reads are pruned too. If the kept heads share the others unevenly, the model
    becomes mha, in which every head has its own copy.
    """
    pruning = _check(config, kept)
    heads = {"num_heads": len(kept[0]), "head_dim": config.head_width}
    return config.model_copy(update=heads | pruning.config(config, kept))


def prune_heads(config: ModelConfig, tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """`tensors` of a model, by their names in DecoderLM → those of the pruned model; tensors without heads are unchanged."""
    pruned = prune_config(config, kept)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _ATTENTION.fullmatch(name)
        out[name] = _pruned(config, pruned, found[2], tensor, kept[int(found[1])]) if found else tensor
    return out


def _pruned(config: ModelConfig, pruned: ModelConfig, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """One tensor of an attention module."""
    owner = name.rpartition(".")[0]
    if owner == "":
        return _pick(tensor, kept, 1)
    if name == "out.bias":
        return tensor
    if name == "out.weight":
        return _pick(tensor, kept, config.head_width, dim=1)
    if owner == "query":
        return _pick(tensor, kept, config.head_width)
    if owner in ("key_value", "qkv"):
        (before, width), (after, _) = (_blocks(one) for one in (config, pruned))
        read = [head * before // config.num_heads for head in kept]
        return _pick(tensor, read if after == len(kept) else sorted(set(read)), width)
    raise ValueError(f"{name}: not a tensor of an attention module whose heads can be pruned")


def _blocks(config: ModelConfig) -> tuple[int, int]:
    pruning = attention_variant(config.attention).pruning
    assert pruning is not None
    return pruning.blocks(config)


def _pick(tensor: Tensor, blocks: Sequence[int], width: int, dim: int = 0) -> Tensor:
    """Concatenate the given blocks of `width` rows (or columns)."""
    index = [block * width + offset for block in blocks for offset in range(width)]
    return tensor[index] if dim == 0 else tensor[:, index]


def _check(config: ModelConfig, kept: Kept) -> Pruning:
    """How the heads of this variant are pruned. UserError if they cannot be, ValueError if they do not exist."""
    pruning = attention_variant(config.attention).pruning
    if pruning is None:
        raise UserError(f"model.attention = {config.attention!r}: {unprunable(config.attention)}")
    if not position_kind(config).prunable:
        raise UserError(
            f"model.position = {config.position!r}: heads cannot be pruned, since their slopes depend on their numbers"
        )
    counts = {len(of_layer) for of_layer in kept}
    if len(counts) != 1:
        raise UserError(f"layers would keep different numbers of heads ({', '.join(map(str, sorted(counts)))})")
    if len(kept) != config.num_layers or counts == {0}:
        raise ValueError(f"heads of {len(kept)} layers, the model has {config.num_layers}")
    for of_layer in kept:
        if list(of_layer) != sorted({*of_layer}) or not 0 <= of_layer[0] <= of_layer[-1] < config.num_heads:
            raise ValueError(f"{list(of_layer)} are not heads of {config.num_heads} in ascending order")
    return pruning
