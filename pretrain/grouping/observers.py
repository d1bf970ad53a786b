"""What heads of all layers do alike: observers of a model's attention layers, and their Gram matrices over all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.gha.constraint import HeadConstraint
from pretrain.distributed.layout import Layout

_ATTENTION = re.compile(r"(?:.*\.)?blocks\.(\d+)\.attention")


def attention_layers(module: nn.Module) -> dict[int, Any]:
    """The attention layers below `module` by the number of their block: all, or those of a pipeline stage."""
    found = ((_ATTENTION.fullmatch(name), layer) for name, layer in module.named_modules())
    return {int(match[1]): layer for match, layer in found if match}


def summed_grams(observers: Mapping[int, HeadConstraint], layers: int, heads: int, layout: Layout) -> Tensor:
    """Gram matrices of all layers, summed over all ranks' passes since the last call: (L, N, N) float64 on the CPU.

    `observers` are those of this rank's layers; those of other layers are zero. Every rank calls it.
    """
    gram_LNN = torch.zeros(layers, heads, heads, dtype=torch.float64, device=layout.device)
    for layer, observer in observers.items():
        own_NN = observer.take()
        if layout.coordinate("tensor") == 0:  # all tensor-parallel ranks have the same matrix
            gram_LNN[layer] = own_NN
    if layout.world_size > 1:
        dist.all_reduce(gram_LNN, group=layout.group("world"))
    return gram_LNN.cpu()
