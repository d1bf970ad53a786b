"""Prune heads of a model: remove each pruned head's slice from every tensor, weights, averages and optimizer moments alike.

In an attention module, head i of N with width D has these slices:

    projections of each head         its parts of the rows, as the variant declares them (such as query: [i·D, (i + 1)·D))
    projections of several heads     the part that it reads
    out.weight                       columns [i·D, (i + 1)·D)
    parameters of the module itself  row i (head embeddings)

What all heads share (the output's bias) stays. The pruned model's outputs equal those of the unpruned
model with the pruned heads' columns of out.weight set to zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.registry import attention_variant, layer_configs, layer_kinds, projections_of, variant_of
from model.attention.variant import Kept
from model.gha.faults import mixed_refusal, unprunable
from model.positions.registry import position_kind

_ATTENTION = re.compile(r"blocks\.(\d+)\.attention\.(.+)")


def prune_config(config: ModelConfig, kept: Kept) -> ModelConfig:
    """The configuration of the model with the `kept` heads. UserError if its heads cannot be pruned like this.

    With gqa, key/value heads that no kept head reads are pruned too. If the kept heads share the others unevenly, the model
    becomes mha, in which every head has its own copy.
    """
    _check(config, kept)
    changes: dict[str, object] = {"num_heads": len(kept[0]), "head_dim": config.head_width}
    for layer in layer_kinds(config):
        pruning = variant_of(layer).pruning
        assert pruning is not None
        changes |= pruning.config(layer, kept)
    return config.model_copy(update=changes)


def prune_heads(config: ModelConfig, tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """`tensors` of a model, by their names in DecoderLM → those of the pruned model; tensors without heads are unchanged."""
    before, after = layer_configs(config), layer_configs(prune_config(config, kept))
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        if found := _ATTENTION.fullmatch(name):
            layer = int(found[1])
            out[name] = _pruned(before[layer], after[layer], found[2], tensor, kept[layer])
    return out


def _pruned(config: ModelConfig, pruned: ModelConfig, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """One tensor of an attention module."""
    owner, projections = name.rpartition(".")[0], projections_of(config)
    if owner == "":
        return _pick(tensor, kept, 1)
    if name == "out.bias":
        return tensor
    if name == "out.weight":
        return _pick(tensor, kept, config.head_width, dim=1)
    if owner not in projections:
        return tensor
    before = projections[owner]
    if before.kind in ("column", "expand"):
        return _pick(tensor, kept, before.columns // config.num_heads)
    after = projections_of(pruned)[owner].parts
    read = [head * before.parts // config.num_heads for head in kept]
    return _pick(tensor, read if after == len(kept) else sorted(set(read)), before.width)


def _pick(tensor: Tensor, blocks: Sequence[int], width: int, dim: int = 0) -> Tensor:
    """Concatenate the given blocks of `width` rows (or columns)."""
    index = [block * width + offset for block in blocks for offset in range(width)]
    return tensor[index] if dim == 0 else tensor[:, index]


def _check(config: ModelConfig, kept: Kept) -> None:
    """UserError if heads of the model cannot be pruned, ValueError if they do not exist."""
    for name in dict.fromkeys(config.pattern):
        if attention_variant(name).pruning is None:
            raise UserError(f"model.attention = {name!r}: {unprunable(name)}")
    if why := mixed_refusal(config):
        raise UserError(f"model.attention = {', '.join(config.pattern)}: {why}")
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
