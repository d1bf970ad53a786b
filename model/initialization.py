"""Initial weights as a function of seed, name and shape alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.registry import is_attention_output, is_head_embedding
from model.build import unsharded_shapes
from model.parallel.sharding import Spec, partition_specs
from model.row import RowModel

LAMBDA_STD = 0.1  # of the code released with arXiv 2410.05258


def init_weights(model: RowModel, seed: int) -> None:
    """Set every parameter of `model`, or this rank's shard of it, to its `initial_value`, on any device and in any type."""
    initial = InitialWeights(model.config, seed, partition_specs(model), model.layers.rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name))


class InitialWeights:
    """The initial weights of a tensor-parallel rank of a resolved model, by the parameters' unsharded names."""

    def __init__(self, config: ModelConfig, seed: int, specs: Mapping[str, Spec], rank: int = 0) -> None:
        self.config, self.seed, self.specs, self.rank = config, seed, specs, rank
        self.shapes = unsharded_shapes(config)

    def __call__(self, name: str) -> Tensor:
        """The rank's shard of a parameter, float32 on the CPU."""
        return self.specs[name].shard(initial_value(self.config, self.seed, name, self.shapes[name]), self.rank)


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """The initial value of the parameter `name`, float32 on the CPU.

    Norm weights are 1 and biases 0. Everything else is N(0, init_std), but for head embeddings, N(0, head_embedding_std) where
    it is given, the vectors of λ in diff, N(0, 0.1), the weights of factors in tpa, N(0, sqrt(2 / (inputs + outputs))), after
    Glorot and Bengio, and the two projections into the residual stream, N(0, init_std / sqrt(2·num_layers)), since that many of
    them are summed (GPT-2), that of attention times attention_output_init_scale. Each parameter has its own generator, seeded
    by a hash of seed and name, so its value does not depend on the order of construction, other parameters or the global RNG. A
    rank that holds a shard draws the full parameter and keeps its shard.
    """
    *_, owner, kind = name.split(".")
    if kind == "bias":
        return torch.zeros(shape)
    if owner.endswith("norm"):
        return torch.ones(shape)
    std = config.init_std
    if is_attention_output(name):
        std = config.attention_output_init_scale * std / math.sqrt(2 * config.num_layers)
    elif name.endswith("mlp.down.weight"):
        std /= math.sqrt(2 * config.num_layers)
    elif owner.endswith("_factors"):
        std = math.sqrt(2 / sum(shape))
    elif kind.startswith("lambda_"):
        std = LAMBDA_STD
    elif is_head_embedding(name) and config.head_embedding_std is not None:
        std = config.head_embedding_std
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator) * std
