"""The manyheads decoder for transformers. Exported folders hold a copy of this file, which needs torch and transformers only.

attention_manyheads.py beside it has the kinds of attention.

Parameters have the names and shapes that the training code gives them, under `model.`; the output layer is `lm_head.weight`.
Letters of shapes: B sequences, S tokens of this pass, T cached and new tokens, N query heads, D the width of a head, C = D/2,
H the hidden width, V the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_manyheads import ATTENTION, HEAD_EMBEDDINGS, ManyheadsAttention, ManyheadsEmbeddedAttention, Rotary
from .configuration_manyheads import ManyheadsConfig
from .differential_manyheads import DIFFERENTIAL, ManyheadsLambdas
from .latent_manyheads import LATENT, ManyheadsExpand
from .low_rank_manyheads import LOW_RANK

KINDS: dict[str, type[ManyheadsAttention]] = {**ATTENTION, **DIFFERENTIAL, **LATENT, **LOW_RANK}  # those of each family
MASKED = ("sdpa", "eager")  # attention implementations that accept any mask and biases of scores


def rotary_tables(position_ids: Tensor, config: ManyheadsConfig, dtype: torch.dtype) -> Rotary:
    """cos and sin of each token's angles, (B or 1, 1, S, C), in float32 or wider (RoFormer, arXiv 2104.09864).

    For what is D wide, C is D/2.

    Recomputed in each pass: from_pretrained leaves buffers that are not in the file uninitialised.
    """
    wide, tables = torch.promote_types(dtype, torch.float32), {}
    for width in config.rotary_widths:
        turned = config.rotated_channels(width)  # the other pairs have the angle 0
        channels_C = torch.arange(0, turned, 2, dtype=wide, device=position_ids.device)
        frequencies_C = F.pad(1.0 / config.rope_theta ** (channels_C / turned), (0, (width - turned) // 2))
        angles = position_ids[:, None, :, None].to(wide) * frequencies_C
        tables[width] = angles.cos(), angles.sin()
    return tables


def positions_in_documents(documents_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The position of each token in its document, (B, T); padding before the first one does not count."""
    places_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    if attention_mask is not None:
        places_BT = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0).to(documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_BT - (places_BT * begins_BT).cummax(dim=1).values


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head (Press et al., arXiv 2108.12409, section 3 and the released code).

    For a power of two, a geometric sequence from 2^(-8/n). Otherwise the slopes of the next lower power of two, followed by
    every second slope of the next higher one.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4 * (i + 1) / below) for i in range(0, 2 * (num_heads - below), 2)]


def with_alibi(mask: Tensor, num_heads: int, offset: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Add ALiBi to a mask (B or 1, 1, S, T), True or 0 where a query sees a key: a bias on scores, (B or 1, N, S, T).

    The first query is at `offset`. Only differences of positions matter, so padding on the left changes nothing.
    """
    wide, lowest = torch.promote_types(dtype, torch.float32), torch.finfo(dtype).min
    slopes_N11 = torch.tensor(alibi_slopes(num_heads), dtype=wide, device=mask.device)[:, None, None]
    queries_S1 = torch.arange(mask.shape[-2], device=mask.device)[:, None] + offset
    bias_NST = -slopes_N11 * (queries_S1 - torch.arange(mask.shape[-1], device=mask.device))
    if mask.dtype == torch.bool:
        return torch.where(mask, bias_NST, lowest).to(dtype)
    return (mask.to(wide) + bias_NST).clamp(min=lowest).to(dtype)


def also(mask: Tensor, visible: Tensor) -> Tensor:
    """A mask, True or 0 where a query sees a key, that also hides what is not `visible`."""
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def in_window(mask: Tensor, window: int, offset: int | Tensor) -> Tensor:
    """(S, T), True for the last `window` keys up to the query's own; the first query is at `offset`."""
    queries_S1 = torch.arange(mask.shape[-2], device=mask.device)[:, None] + offset
    return torch.arange(mask.shape[-1], device=mask.device) > queries_S1 - window


class ManyheadsMLP(nn.Module):
    """down(gelu(up(x))), or with a gate down(silu(gate(x)) ⊙ up(x))."""

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__()
        self.gated = config.hidden_act == "silu"
        if self.gated:
            self.gate = nn.Linear(config.hidden_size, config.intermediate_size, config.bias)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, config.bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, config.bias)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """(B, S, H) → (B, S, H)."""
        return self.down(F.silu(self.gate(x_BSH)) * self.up(x_BSH) if self.gated else F.gelu(self.up(x_BSH)))


def build_norm(config: ManyheadsConfig) -> nn.Module:
    """LayerNorm or RMSNorm over the hidden width; RMSNorm never has a bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)


class ManyheadsBlock(GradientCheckpointingLayer):
    """Attention, then MLP; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: ManyheadsConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = KINDS[config.kind(layer_idx)](config, layer_idx)
        self.mlp_norm = build_norm(config)
        self.mlp = ManyheadsMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, S, H) → (B, S, H); the keywords are those of attention."""
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class ManyheadsPreTrainedModel(PreTrainedModel):
    """What transformers requires of every model."""

    config: ManyheadsConfig
    config_class = ManyheadsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ManyheadsBlock"]  # noqa: RUF012 (transformers' own form, here and below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": ManyheadsBlock, "attentions": ManyheadsAttention}  # noqa: RUF012
    _input_embed_layer = "token_embedding"

    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings of heads, sinks and biases start at zero, norms at one, all else at normal(0, initializer_range).

        The vectors of diff's λ start at normal(0, 0.1).
        """
        super()._init_weights(module)
        if isinstance(module, ManyheadsAttention) and module.sink is not None:
            init.zeros_(module.sink)
        if isinstance(module, ManyheadsEmbeddedAttention):
            for name in HEAD_EMBEDDINGS:
                if (embedding := getattr(module, name)) is not None:
                    init.zeros_(embedding)
        elif isinstance(module, ManyheadsLambdas):
            for vector in module.parameters():
                init.normal_(vector, std=0.1)
        elif isinstance(module, ManyheadsExpand):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)


class ManyheadsModel(ManyheadsPreTrainedModel):
    """Token ids to hidden states after the last norm.

    Positions count from a sequence's first token that is not padding. With attend_across_documents false they count from the
    first token of each document, whatever `position_ids` says, and cached generation must know where the documents of cached
    tokens end: the cache gets one more layer, which stores a mark for each token and so follows every reordering, cropping and
    repetition of the cache. This requires a cache that grows (DynamicCache).
    """

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(ManyheadsBlock(config, number) for number in range(config.num_hidden_layers))
        self.final_norm = build_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids (B, S), or their embeddings (B, S, H), that follow the cached tokens; the 2D mask (B, T) is 0 on padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        x_BSH: Tensor = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        offset = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = self._positions(x_BSH, attention_mask, offset)
        documents_BT = None
        if not self.config.attend_across_documents:
            documents_BT = self._documents(input_ids, attention_mask, past_key_values)
        masks = self._masks(x_BSH, documents_BT, attention_mask, position_ids, past_key_values, offset)
        if documents_BT is not None:
            position_ids = positions_in_documents(documents_BT, attention_mask)[:, -x_BSH.shape[1] :]
        rotary = None
        if self.config.position == "rope":
            rotary = rotary_tables(position_ids, self.config, x_BSH.dtype)
        elif self.config.position == "learned":
            x_BSH = x_BSH + self._learned(position_ids, offset)
        x_BSH = self.dropout(x_BSH)
        for number, block in enumerate(self.blocks):
            x_BSH = block(
                x_BSH,
                rotary=rotary if self.config.layer_position(number) == "rope" else None,
                attention_mask=masks[self._kind_of_mask(number)],
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.final_norm(x_BSH), past_key_values=past_key_values)

    def _positions(self, x_BSH: Tensor, attention_mask: Tensor | None, offset: int | Tensor) -> Tensor:
        """Positions (B or 1, S), counted from the first token that is not padding."""
        length = x_BSH.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:].to(x_BSH.device)
        return (torch.arange(length, device=x_BSH.device) + offset)[None]

    def _learned(self, position_ids: Tensor, offset: int | Tensor) -> Tensor:
        longest = self.config.max_position_embeddings
        # Reading the positions would synchronise the GPU; with fewer tokens than rows none can be out of range.
        if offset + position_ids.shape[1] > longest and position_ids.max() >= longest:
            raise ValueError(f"a token at position {int(position_ids.max())}, but max_position_embeddings is {longest}")
        return self.position_embedding(position_ids)

    def _kind_of_mask(self, number: int) -> tuple[bool, int | None]:
        """Whether a layer has ALiBi's biases, and its window."""
        return self.config.layer_position(number) == "alibi", self.config.layer_window(number)

    def _masks(
        self,
        x_BSH: Tensor,
        documents_BT: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        offset: int | Tensor,
    ) -> dict[tuple[bool, int | None], Tensor | None]:
        """What each query sees, with ALiBi's biases, in the form that the attention implementation expects: by kind of mask."""
        kinds = {self._kind_of_mask(number) for number in range(self.config.num_hidden_layers)}
        needs = {
            "position alibi": self.config.position == "alibi",
            "attend_across_documents false": documents_BT is not None,
            "attention_window": self.config.attention_window is not None,
            "attention_sinks or logit_softcap": self.config.capped_or_sunk,
        }
        kernel, own = self.config._attn_implementation, [why for why, needed in needs.items() if needed]
        if own and kernel not in MASKED:
            raise ValueError(f"attn_implementation {kernel!r}: {own[0]} needs {' or '.join(MASKED)}")
        mask: Any = create_causal_mask(  # a tensor if it must not be skipped
            config=self.config,
            inputs_embeds=x_BSH,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
            allow_is_causal_skip=not own,
        )
        if documents_BT is not None:
            mask = also(mask, documents_BT[:, None, -x_BSH.shape[1] :, None] == documents_BT[:, None, None, :])
        heads = self.config.num_attention_heads
        masks = {}
        for biased, window in kinds:
            near = mask if window is None else also(mask, in_window(mask, window, offset))
            masks[biased, window] = with_alibi(near, heads, offset, x_BSH.dtype) if biased else near
        return masks

    def _documents(self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """The number of each token's document, (B, T). An end-of-document token belongs to the document that it ends."""
        if input_ids is None or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError("attend_across_documents false needs input_ids, and a 2D attention_mask if there is one")
        assert self.config.end_of_document is not None
        ends_BT = input_ids.eq(self.config.end_of_document)
        if attention_mask is not None:  # padding may use the same token
            ends_BT = ends_BT & attention_mask[:, -input_ids.shape[1] :].to(ends_BT)
        if cache is not None:
            ends_BT = self._with_cached(ends_BT, cache)
        return ends_BT.cumsum(dim=1) - ends_BT.long()

    def _with_cached(self, ends_BS: Tensor, cache: Cache) -> Tensor:
        """Store these marks in the cache after the blocks' layers; return those of all tokens, (B, T)."""
        number = self.config.num_hidden_layers
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"attend_across_documents false generates with a DynamicCache, not a {type(cache).__name__}")
        while len(cache.layers) <= number:
            cache.layers.append(DynamicLayer())
        marks_B1S1 = ends_BS[:, None, :, None]
        marks_B1T1, _ = cache.update(marks_B1S1, marks_B1S1, number)
        return marks_B1T1[:, 0, :, 0]


class ManyheadsForCausalLM(ManyheadsPreTrainedModel, GenerationMixin):
    """The language model: logits of the next token, a loss if labels are given, and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.model = ManyheadsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, S, V); if `logits_to_keep` is not 0, only of the last `logits_to_keep` tokens.

        `labels` (B, S) are the tokens themselves, -100 to ignore one: each token is predicted from those before it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BSV = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ManyheadsForSequenceClassification(GenericForSequenceClassification, ManyheadsPreTrainedModel):
    """A linear layer on the last token that is not padding."""

    def __init__(self, config: ManyheadsConfig) -> None:
        # The generic constructor's AutoModel does not know a class that is loaded from a folder.
        ManyheadsPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ManyheadsModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = ["ManyheadsForCausalLM", "ManyheadsForSequenceClassification", "ManyheadsModel", "ManyheadsPreTrainedModel"]
