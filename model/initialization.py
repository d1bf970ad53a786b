"""Initial weights as a function of seed, name and shape alone."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.sharding import cut, whole_shapes
from model.transformer import DecoderLM


def init_weights(model: DecoderLM, seed: int) -> None:
    """Set every parameter of `model`, or this rank's shard of it, to its `initial_value`, whatever its device and type."""
    shapes = whole_shapes(model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = initial_value(model.config, seed, name, shapes[name])
            parameter.copy_(cut(whole, parameter.shape, model.layers.rank))


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """The float32 CPU tensor with which the parameter `name` starts.

    Norm weights are 1 and biases 0. Everything else, head embeddings too, is N(0, init_std); the two projections into the
    residual stream N(0, init_std / sqrt(2·num_layers)), since that many of them are added up (GPT-2). A parameter's own
    generator draws it, seeded by a hash of seed and name: order of construction, other parameters and the global RNG have no
    part in it, and a rank that owns a slice of the parameter draws the whole and cuts it.
    """
    *_, owner, kind = name.split(".")
    if kind == "bias":
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(("attention.out.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator) * std
