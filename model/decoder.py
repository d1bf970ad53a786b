"""The decoder language model: embed → blocks → head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import Cache, LayerCache
from model.attention.registry import layer_configs, variant_of
from model.block import Block
from model.costs.parameters import attention_parameters, parameters
from model.layers import Layers
from model.positions.learned import add_positions, position_table
from model.positions.registry import position_kind
from model.row import Pass, RowLayer, RowModel


class DecoderLM(RowModel):
    """A causal language model. Its output layer has no bias."""

    token_embedding: nn.Embedding
    position_embedding: nn.Embedding  # with learned positions
    dropout: nn.Dropout
    blocks: nn.ModuleList
    final_norm: nn.Module
    output: nn.Linear  # without tied embeddings

    @staticmethod
    def describe(config: ModelConfig, layers: Layers) -> list[RowLayer]:
        vocab_size, hidden = _vocab_size(config), config.hidden_size
        counts = parameters(config)
        norm = counts["norms"] // (2 * config.num_layers + 1)
        others = counts["mlp"] // config.num_layers + 2 * norm
        tokens = partial(layers.embedding, vocab_size, hidden)
        positions: dict[str, Callable[[], nn.Module]] = {}
        if position_kind(config).has_table:
            positions["position_embedding"] = partial(position_table, config)
        positions["dropout"] = partial(nn.Dropout, config.dropout)
        output = {"output": partial(layers.output, hidden, vocab_size)}
        return [
            RowLayer({"token_embedding": tokens}, _embed, vocab_size * hidden),
            RowLayer(positions, _add_positions, (config.max_position_embeddings or 0) * hidden),
            *(
                RowLayer(
                    {f"blocks.{number}": partial(Block, layer, layers, number)},
                    partial(_run_block, number),
                    attention_parameters(layer) + others,
                    is_block=True,
                )
                for number, layer in enumerate(layer_configs(config))
            ),
            RowLayer({"final_norm": partial(layers.norm, config)}, _normalize, norm),
            RowLayer({"token_embedding": tokens} if config.tie_embeddings else output, _project, vocab_size * hidden),
        ]

    def logits(self, tokens_BS: Tensor, cache: Cache | None = None, last_only: bool = False) -> Tensor:
        """Logits (B, S, vocab), float32 or wider whatever the weights' type. Training runs `forward`.

        With a cache the tokens follow those already in it and are added to it. `last_only` returns only the logits of the last
        token, (B, 1, vocab): those of a long prompt would waste gigabytes. Both need an unsharded model.
        """
        if self.layers.size > 1 and (cache is not None or last_only):
            raise ValueError("a shard of a model cannot generate; load its checkpoint unsharded (pretrain/inference.py)")
        pass_ = Pass(self.config, self.layers, self.recompute_activations, cache=cache, last_only=last_only)
        own_SBV = self.run(tokens_BS, pass_)
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        return self.layers.logits(own_SBV, _vocab_size(self.config))

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens of each of `batch_size` sequences; it grows on demand."""
        kept = [variant_of(layer).cached(layer) for layer in layer_configs(self.config)]
        weight = self.token_embedding.weight
        return Cache([LayerCache(batch_size, cached, capacity, weight.dtype, weight.device) for cached in kept])


def _vocab_size(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("the configuration is not resolved: vocab_size is null")
    if config.separates_documents and config.end_of_document is None:
        raise ValueError("the configuration is not resolved: end_of_document is null")
    return config.vocab_size


# What the layers of the row do. `holder` is a DecoderLM or a pipeline stage's layer, with modules of the same names.


def _embed(holder: Any, tokens_BS: Tensor, pass_: Pass) -> Tensor:
    """Token ids (B, S) → hidden states (S, B, H), of this rank's tokens."""
    pass_.begin(tokens_BS)
    x_SBH: Tensor = holder.token_embedding(tokens_BS)
    return x_SBH


def _add_positions(holder: Any, x_SBH: Tensor, pass_: Pass) -> Tensor:
    """Learned positions, if there are any, then dropout."""
    if position_kind(pass_.config).has_table:
        start, end = pass_.offset, pass_.offset + pass_.length(x_SBH)
        x_SBH = add_positions(x_SBH, holder.position_embedding, pass_.layers, start, end, pass_.restarts_BT)
    dropped: Tensor = holder.dropout(x_SBH)
    return dropped


def _run_block(number: int, holder: nn.Module, x_SBH: Tensor, pass_: Pass) -> Tensor:
    return pass_.run_block(holder.get_submodule(f"blocks.{number}"), x_SBH, number)


def _normalize(holder: Any, x_SBH: Tensor, pass_: Pass) -> Tensor:
    normalized: Tensor = holder.final_norm(x_SBH[-1:] if pass_.last_only else x_SBH)
    return normalized


def _project(holder: Any, x_SBH: Tensor, pass_: Pass) -> Tensor:
    """Hidden states → this rank's logits (S, B, V)."""
    weight_VH = (holder.token_embedding if pass_.config.tie_embeddings else holder.output).weight
    return pass_.layers.own_logits(x_SBH, weight_VH, _vocab_size(pass_.config))
