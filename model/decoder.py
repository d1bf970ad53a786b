"""The decoder language model: embed → blocks → head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig
from model.attention.cache import Cache, LayerCache
from model.attention.registry import attention_variant
from model.block import Block
from model.layers import WHOLE, Layers
from model.positions.positions import AttentionMask, Positions, make_positions


class DecoderLM(nn.Module):
    """A causal language model of a resolved configuration (Config.resolved). init_weights gives it its initial weights.

    `layers` makes its parts, whole or as this rank's shards. With `recompute_activations` a block keeps only its input and runs
    a second time in the backward pass, with the same dropout. The output layer has no bias.
    """

    def __init__(self, config: ModelConfig, layers: Layers = WHOLE, recompute_activations: bool = False) -> None:
        super().__init__()
        if config.vocab_size is None or (config.position == "learned" and config.max_position_embeddings is None):
            raise ValueError("the configuration is not resolved: vocab_size or max_position_embeddings is null")
        if not config.attend_across_documents and config.end_of_document is None:
            raise ValueError("the configuration is not resolved: end_of_document is null")
        self.config = config
        self.layers = layers
        self.recompute_activations = recompute_activations
        self.token_embedding = layers.embedding(config.vocab_size, config.hidden_size)
        if config.max_position_embeddings is not None:
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.num_layers))
        self.final_norm = layers.norm(config)
        if not config.tie_embeddings:
            self.output = layers.output(config.hidden_size, config.vocab_size)

    def forward(
        self, tokens_BS: Tensor, labels_BS: Tensor | None = None, cache: Cache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, S, vocab), or with labels the cross-entropy of each token (B, S); float32 whatever the weights' type.

        With a cache the tokens stand after those already in it, and are added to it. `last_only` gives the logits of the last
        token alone, (B, 1, vocab): those of a long prompt would fill gigabytes that nobody reads. Both are for whole models.
        """
        if self.layers.size > 1 and (cache is not None or last_only):
            raise ValueError("a shard of a model cannot generate; load its checkpoint whole (pretrain/inference.py)")
        positions = self.positions(tokens_BS, cache)
        x_SBH = self.embed(tokens_BS, positions)
        for number, block in enumerate(self.blocks):
            x_SBH = self.run_block(block, x_SBH, positions, cache.layers[number] if cache is not None else None)
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        return self.head(x_SBH[-1:] if last_only else x_SBH, labels_BS)

    def positions(self, tokens_BS: Tensor, cache: Cache | None = None) -> Positions:
        """What the blocks need to know about these tokens, which stand after the cached ones."""
        weight, mask = self.token_embedding.weight, None
        if not self.config.attend_across_documents:
            assert self.config.end_of_document is not None
            tokens_BT = tokens_BS if cache is None else cache.append_tokens(tokens_BS)
            mask = AttentionMask(documents_BT=document_numbers(tokens_BT, self.config.end_of_document))
        offset = cache.length if cache is not None else 0
        heads = self.layers.own(self.config.num_heads)
        return make_positions(self.config, tokens_BS.shape[1], offset, weight.dtype, weight.device, mask, heads)

    def embed(self, tokens_BS: Tensor, positions: Positions) -> Tensor:
        """Token ids (B, S) → residual stream (S, B, H), of this rank's tokens."""
        x_SBH: Tensor = self.token_embedding(tokens_BS)
        if self.config.position == "learned":
            end = positions.offset + tokens_BS.shape[1]
            if end > self.position_embedding.num_embeddings:
                raise ValueError(f"{end} tokens, but max_position_embeddings is {self.position_embedding.num_embeddings}")
            x_SBH = x_SBH + self.layers.own_tokens(self.position_embedding.weight[positions.offset : end, None])
        dropped: Tensor = self.dropout(x_SBH)
        return dropped

    def run_block(self, block: nn.Module, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """One block, recomputed in the backward pass if this model does so."""
        out_SBH: Tensor
        if self.recompute_activations and torch.is_grad_enabled() and cache is None:
            out_SBH = checkpoint(block, x_SBH, positions, use_reentrant=False)  # restores the RNG, so dropout repeats
        else:
            out_SBH = block(x_SBH, positions, cache)
        return out_SBH

    def head(self, x_SBH: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Residual stream (S, B, H) → logits or losses, as `forward`."""
        assert self.config.vocab_size is not None
        weight_VH = self.token_embedding.weight if self.config.tie_embeddings else self.output.weight
        x_SBH = self.final_norm(x_SBH)
        own_SBV = self.layers.own_logits(x_SBH, weight_VH, self.config.vocab_size)
        if labels_BS is None:
            return self.layers.logits(own_SBV, self.config.vocab_size)
        return self.layers.losses(own_SBV, labels_BS)

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for at most `capacity` tokens of each of `batch_size` sequences; it grows as they come."""
        kv_heads = attention_variant(self.config.attention).kv_heads(self.config)
        shape, weight = (batch_size, kv_heads, capacity, self.config.head_width), self.token_embedding.weight
        return Cache([LayerCache(shape, weight.dtype, weight.device) for _ in self.blocks])


def document_numbers(tokens_BT: Tensor, end_of_document: int) -> Tensor:
    """The number of each token's document in its sequence, (B, T); an end-of-document token belongs to the one that it ends."""
    ends_BT = (tokens_BT == end_of_document).int()
    return ends_BT.cumsum(dim=1, dtype=torch.int32) - ends_BT
