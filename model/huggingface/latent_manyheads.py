"""Latent and tied keys and values of the manyheads decoder for transformers. Exported folders hold a copy of this file.

Latent attention of head i, with the latent c of its group, RMSNorm included, and one key for all heads, k^S:

    k_i = W^K_i c + b^K_i     v_i = W^V_i c + b^V_i     score = (q_i·k_i + q^S_i·k^S) / √(d + d_S)

To generate, W^K_i moves to the query and W^V_i behind the average (the absorbed form); q_i·b^K_i cancels in softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from .attention_manyheads import ManyheadsAttention, Rotary, rotate, split_heads
from .configuration_manyheads import ManyheadsConfig


class ManyheadsExpand(nn.Module):
    """A linear layer of `groups` latents, (…, G·inputs) → (…, outputs): equal shares of its outputs read one each."""

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, latents: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.groups, -1))
        out = torch.einsum("...gc,gwc->...gw", latents.unflatten(-1, (self.groups, -1)), weight).flatten(-2)
        return out if self.bias is None else out + self.bias


class ManyheadsLatentAttention(ManyheadsAttention):
    """mla and gla: the cache stores the latents, and the key that all heads share, side by side as keys; values have no width.

    Few queries attend to these themselves; for more, keys and values of heads are expanded from them.
    """

    def add_projections(self, config: ManyheadsConfig) -> None:
        hidden, bias, heads, width = config.hidden_size, config.bias, self.num_heads, self.head_dim
        self.latents, self.shared_width = config.latents(self.layer_idx), config.rope_dim or 0
        assert config.latent_dim is not None
        self.latent_width = config.latent_dim // self.latents
        self.scaling, self.num_key_value_groups = (width + self.shared_width) ** -0.5, 1
        if config.query_rank is not None:
            self.query_latent = nn.Linear(hidden, config.query_rank, bias)
            self.query_latent_norm = nn.RMSNorm(config.query_rank, config.norm_epsilon)
        self.query = nn.Linear(config.query_rank or hidden, heads * (width + self.shared_width), bias)
        self.latent = nn.Linear(hidden, config.latent_dim, bias)
        self.latent_norm = nn.RMSNorm(self.latent_width, config.norm_epsilon)
        if self.shared_width:
            self.shared_key = nn.Linear(hidden, self.shared_width, bias)
        if self.latents == 1:
            self.key_value: nn.Module = nn.Linear(self.latent_width, 2 * heads * width, bias)
        else:
            self.key_value = ManyheadsExpand(self.latents, self.latent_width, 2 * heads * width, bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        of_queries = x_BSH if self.config.query_rank is None else self.query_latent_norm(self.query_latent(x_BSH))
        query = split_heads(self.query(of_queries), self.head_dim + self.shared_width)
        latents_BSGC = self.latent_norm(self.latent(x_BSH).unflatten(-1, (self.latents, -1)))
        kept_B1SF = latents_BSGC.flatten(-2)[:, None]
        if self.shared_width:
            own_BNSD, shared_BNSD = self.own_and_shared(query)
            query = torch.cat([own_BNSD, rotate(shared_BNSD, rotary)], dim=-1)
            kept_B1SF = torch.cat([kept_B1SF, rotate(self.shared_key(x_BSH)[:, None], rotary)], dim=-1)
        return query, kept_B1SF, kept_B1SF[..., :0]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attend = self.absorbed if self.absorbs(query.shape[2], key.shape[2]) else self.expanded
        return attend(query, key, attention_mask, **kwargs)

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer multiplications than to expand all keys.

        It reads the weights themselves, so the layer must be ours, without adapters. Its keys are too wide for flash kernels.
        What it leaves out cancels only in a plain softmax.
        """
        if self.config.capped_or_sunk:
            return False
        if type(self.key_value) not in (nn.Linear, ManyheadsExpand) or is_flash_attention_requested(self.config):
            return False
        moved, cached = 2 * self.head_dim * self.latent_width, self.latents * self.latent_width + self.shared_width
        absorbed = queries * keys * 2 * cached + queries * moved
        return absorbed < queries * keys * (2 * self.head_dim + self.shared_width) + keys * moved

    def expanded(
        self, query: Tensor, kept_B1TF: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to keys and values of heads."""
        latents_BTC, shared_BTD = kept_B1TF[:, 0].split([self.latents * self.latent_width, self.shared_width], dim=-1)
        k_BNTD, v_BNTD = split_heads(self.key_value(latents_BTC), 2 * self.head_dim).chunk(2, dim=-1)
        shared_BNTD = shared_BTD[:, None].expand(-1, self.num_heads, -1, -1)
        return super().attend(query, torch.cat([k_BNTD, shared_BNTD], dim=-1), v_BNTD, attention_mask, **kwargs)

    def absorbed(
        self, query: Tensor, kept_B1TF: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to what the cache stores, one key and value of all heads; a query is zero on latents of other heads."""
        weight, bias = self.key_value.get_parameter("weight"), dict(self.key_value.named_parameters()).get("bias")
        key_NDC, value_NDC = weight.unflatten(0, (self.num_heads, 2, -1)).unbind(1)
        reads_NG = torch.eye(self.latents, dtype=query.dtype, device=query.device)
        reads_N1G1 = reads_NG.repeat_interleave(self.num_heads // self.latents, dim=0)[:, None, :, None]
        own_BNSD, shared_BNSD = self.own_and_shared(query)
        of_latents_BNSF = ((own_BNSD @ key_NDC)[..., None, :] * reads_N1G1).flatten(-2)
        query = torch.cat([of_latents_BNSF, shared_BNSD], dim=-1)
        kept_BNTF = kept_B1TF.expand(-1, self.num_heads, -1, -1)
        averages_BSNF, weights = super().attend(query, kept_BNTF, kept_BNTF, attention_mask, **kwargs)
        averages_BNSF = averages_BSNF[..., : self.latents * self.latent_width].transpose(1, 2)
        averages_BNSC = (averages_BNSF.unflatten(-1, (self.latents, -1)) * reads_N1G1).sum(-2)
        heads_BSND = (averages_BNSC @ value_NDC.mT).transpose(1, 2)
        return (heads_BSND if bias is None else heads_BSND + bias.unflatten(0, (self.num_heads, 2, -1))[:, 1]), weights

    def own_and_shared(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of queries for the keys of heads, and those for the shared key."""
        own_BNSD, shared_BNSD = query.split([self.head_dim, self.shared_width], dim=-1)
        return own_BNSD, shared_BNSD


class ManyheadsTiedAttention(ManyheadsAttention):
    """gta: half of a key is half of its value, the other half one key for all heads, which alone is rotated.

    The cache stores the values side by side: static caches need as many heads of values as of keys, here one.
    """

    def add_projections(self, config: ManyheadsConfig) -> None:
        self.query = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, config.bias)
        self.key_value = nn.Linear(config.hidden_size, self.kept_heads * self.head_dim, config.bias)
        self.shared_key = nn.Linear(config.hidden_size, self.head_dim // 2, config.bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        own_BNSC, shared_BNSC = split_heads(self.query(x_BSH), self.head_dim).chunk(2, dim=-1)
        query = torch.cat([own_BNSC, rotate(shared_BNSC, rotary)], dim=-1)
        return query, rotate(self.shared_key(x_BSH)[:, None], rotary), self.key_value(x_BSH)[:, None]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        v_BKTD = split_heads(value[:, 0], self.head_dim)
        tied_BKTC = v_BKTD[..., : self.head_dim // 2]
        k_BKTD = torch.cat([tied_BKTC, key.expand_as(tied_BKTC)], dim=-1)
        return super().attend(query, k_BKTD, v_BKTD, attention_mask, **kwargs)


LATENT: dict[str, type[ManyheadsAttention]] = {
    "mla": ManyheadsLatentAttention,
    "gla": ManyheadsLatentAttention,
    "gta": ManyheadsTiedAttention,
}
