"""The parts of a block that are not attention: linear builders, norms, MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig


class LinearBuilder(Protocol):
    """Makes a module that maps (…, in_features) to (…, out_features)."""

    def __call__(self, in_features: int, out_features: int, bias: bool) -> nn.Module: ...


@dataclass(frozen=True)
class LinearBuilders:
    """How linear layers are made: the one thing that tensor parallelism changes in a block.

    `column` shards its outputs (heads, MLP channels) over the ranks, `row` its inputs and sums over the ranks, `shared` holds
    projections that all heads read: wherever its weight lies, each rank gets the whole output.
    """

    column: LinearBuilder
    row: LinearBuilder
    shared: LinearBuilder


DENSE = LinearBuilders(column=nn.Linear, row=nn.Linear, shared=nn.Linear)


def build_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm or RMSNorm over the hidden width; RMSNorm never has a bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)


class GeluMLP(nn.Module):
    """down(gelu(up(x))), (S, B, H) → (S, B, H)."""

    def __init__(self, config: ModelConfig, builders: LinearBuilders) -> None:
        super().__init__()
        self.up = builders.column(config.hidden_size, config.ffn_width, config.bias)
        self.down = builders.row(config.ffn_width, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.gelu(self.up(x_SBH)))
        return hidden


class SwigluMLP(nn.Module):
    """down(silu(gate(x)) ⊙ up(x)), (S, B, H) → (S, B, H); Shazeer 2020 (arXiv 2002.05202), section 2."""

    def __init__(self, config: ModelConfig, builders: LinearBuilders) -> None:
        super().__init__()
        # Two layers rather than one of twice the width: a shard of each holds the same channels.
        self.gate = builders.column(config.hidden_size, config.ffn_width, config.bias)
        self.up = builders.column(config.hidden_size, config.ffn_width, config.bias)
        self.down = builders.row(config.ffn_width, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.silu(self.gate(x_SBH)) * self.up(x_SBH))
        return hidden


def build_mlp(config: ModelConfig, builders: LinearBuilders) -> nn.Module:
    return GeluMLP(config, builders) if config.activation == "gelu" else SwigluMLP(config, builders)
