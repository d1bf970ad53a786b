"""Initial weights as a function of seed, name and shape alone."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.build import unsharded_shapes
from model.parallel.sharding import cut
from model.row import RowModel


def init_weights(model: RowModel, seed: int) -> None:
    """Set every parameter of `model`, or this rank's shard of it, to its `initial_value`, whatever its device and type."""
    initial = InitialWeights(model.config, seed, model.layers.rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape))


class InitialWeights:
    """The initial weights of a tensor-parallel rank of a resolved model, by the parameters' unsharded names."""

    def __init__(self, config: ModelConfig, seed: int, rank: int = 0) -> None:
        self.config, self.seed, self.rank = config, seed, rank
        self.shapes = unsharded_shapes(config)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """The shard of `shape` of a parameter, float32 on the CPU."""
        return cut(initial_value(self.config, self.seed, name, self.shapes[name]), shape, self.rank)


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
