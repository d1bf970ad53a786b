"""The decoder as a row of layers that pipeline stages share out between them; knows no engine.

A layer holds its parameters under the names that they have in DecoderLM, so that initial weights and checkpoints are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig
from model.block import Block
from model.costs.parameters import parameters
from model.decoder import document_numbers
from model.layers import Layers
from model.positions.positions import AttentionMask, Positions, make_positions

Hidden = Tensor | tuple[Tensor, Tensor]  # hidden states (S, B, H) and, where attention keeps to them, documents (B, S)


@dataclass(frozen=True)
class StageLayer:
    """One layer of the row, built as `kind(*arguments)`. `weight` is its number of parameters, as the stage holds them."""

    kind: type[nn.Module]
    arguments: tuple[Any, ...]
    weight: int

    def build(self) -> nn.Module:
        return self.kind(*self.arguments)


def pipeline_layers(config: ModelConfig, layers: Layers, recompute_activations: bool) -> list[StageLayer]:
    """The layers of a resolved config in their order: tokens, positions, blocks, final norm, output.

    With tied embeddings the last is a TokenLayer again, as which `project` is called.
    """
    parts = parameters(config)
    norm = parts["norms"] // (2 * config.num_layers + 1)
    block = (parts["attention"] + parts["mlp"]) // config.num_layers + 2 * norm
    positions_weight = (config.max_position_embeddings or 0) * config.hidden_size
    tokens = parts["embeddings"] - positions_weight
    positions = StagePositions(config, layers)
    return [
        StageLayer(TokenLayer, (config, layers), tokens),
        StageLayer(PositionLayer, (config, layers), positions_weight),
        *(
            StageLayer(BlockLayer, (config, layers, number, positions, recompute_activations), block)
            for number in range(config.num_layers)
        ),
        StageLayer(FinalNormLayer, (config, layers), norm),
        StageLayer(TokenLayer if config.tie_embeddings else OutputLayer, (config, layers), tokens),
    ]


class StagePositions:
    """What the blocks of a stage need to know about tokens; made once for all blocks, and kept while nothing changes."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        self.config, self.layers = config, layers
        self.key: tuple[object, ...] = ()
        self.documents_BS: Tensor | None = None
        self.positions: Positions | None = None

    def __call__(self, x_SBH: Tensor, documents_BS: Tensor | None) -> Positions:
        length = x_SBH.shape[0] * (self.layers.size if self.layers.sequence else 1)
        key = length, x_SBH.dtype, x_SBH.device
        if self.positions is None or self.key != key or self.documents_BS is not documents_BS:
            mask = None if documents_BS is None else AttentionMask(documents_BT=documents_BS)
            heads = self.layers.own(self.config.num_heads)
            self.positions = make_positions(self.config, length, 0, x_SBH.dtype, x_SBH.device, mask, heads)
            self.key, self.documents_BS = key, documents_BS
        return self.positions


class TokenLayer(nn.Module):
    """Token ids (B, S) → hidden states."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.config, self.layers = config, layers
        assert config.vocab_size is not None
        self.token_embedding = layers.embedding(config.vocab_size, config.hidden_size)

    def forward(self, tokens_BS: Tensor) -> Hidden:
        x_SBH: Tensor = self.token_embedding(tokens_BS)
        if self.config.attend_across_documents:
            return x_SBH
        assert self.config.end_of_document is not None
        return x_SBH, document_numbers(tokens_BS, self.config.end_of_document)

    def project(self, x_SBH: Tensor) -> Tensor:
        """As the output layer of a model with tied embeddings: hidden states → this rank's logits (S, B, V)."""
        assert self.config.vocab_size is not None
        return self.layers.own_logits(x_SBH, self.token_embedding.weight, self.config.vocab_size)


class PositionLayer(nn.Module):
    """Adds learned positions, if there are any; dropout."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.position_embedding = None
        if config.max_position_embeddings is not None:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Hidden) -> Hidden:
        x_SBH, documents_BS = _parts(hidden)
        if self.position_embedding is not None:
            length = x_SBH.shape[0] * (self.layers.size if self.layers.sequence else 1)
            x_SBH = x_SBH + self.layers.own_tokens(self.position_embedding.weight[:length, None])
        return _joined(self.dropout(x_SBH), documents_BS)


class BlockLayer(nn.Module):
    """One block."""

    def __init__(
        self, config: ModelConfig, layers: Layers, number: int, positions: StagePositions, recompute_activations: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): Block(config, layers)})
        self.positions, self.recompute_activations = positions, recompute_activations

    def forward(self, hidden: Hidden) -> Hidden:
        x_SBH, documents_BS = _parts(hidden)
        (block,) = self.blocks.values()
        positions = self.positions(x_SBH, documents_BS)
        if self.recompute_activations and torch.is_grad_enabled():
            return _joined(checkpoint(block, x_SBH, positions, use_reentrant=False), documents_BS)
        return _joined(block(x_SBH, positions), documents_BS)


class FinalNormLayer(nn.Module):
    """The last to see documents."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.final_norm = layers.norm(config)

    def forward(self, hidden: Hidden) -> Tensor:
        x_SBH: Tensor = self.final_norm(_parts(hidden)[0])
        return x_SBH


class OutputLayer(nn.Module):
    """Hidden states → this rank's logits (S, B, V), with a weight of its own."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.layers, self.vocab_size = layers, config.vocab_size
        self.output = layers.output(config.hidden_size, config.vocab_size)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.layers.own_logits(x_SBH, self.output.weight, self.vocab_size)


def _parts(hidden: Hidden) -> tuple[Tensor, Tensor | None]:
    return hidden if isinstance(hidden, tuple) else (hidden, None)


def _joined(x_SBH: Tensor, documents_BS: Tensor | None) -> Hidden:
    return x_SBH if documents_BS is None else (x_SBH, documents_BS)
