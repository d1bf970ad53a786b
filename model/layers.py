"""The factory of a model's layers: unsharded, or a rank's shards."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.auxiliary import AuxiliaryLosses


class Layers:
    """Makes the layers of a model, unsharded on every rank, from torch's own modules.

    This is all that tensor parallelism changes in a model: model/parallel/tensor.py overrides every method. Hidden states are
    unsharded or, under sequence parallelism, a shard of the sequence. `column` and `key_value` return this rank's heads or
    channels for all tokens; `row` maps them back to hidden states.
    """

    rank, size = 0, 1
    sequence = False  # whether hidden states are a shard of the sequence

    def __init__(self) -> None:
        self.auxiliary = AuxiliaryLosses()

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Outputs ordered by head, or independent channels: each rank has a shard of them."""
        return nn.Linear(in_features, out_features, bias)

    def key_value(self, in_features: int, heads: int, width: int, bias: bool) -> nn.Module:
        """`heads` outputs of `width` columns, each read by neighbouring query heads; there may be fewer heads than ranks."""
        return nn.Linear(in_features, heads * width, bias)

    def shared(self, in_features: int, seeds: int, width: int, bias: bool) -> nn.Module:
        """`seeds` outputs of `width` columns, each read by neighbouring heads in full: q, k and v of sha and MHE.

        A rank gets those that its heads read, for all tokens: whole seeds of its own, or, of fewer seeds than ranks, the one
        that it has in common with others, however the weight is sharded.
        """
        return nn.Linear(in_features, seeds * width, bias)

    def expand(self, in_features: int, groups: int, out_features: int, bias: bool) -> nn.Module:
        """Outputs ordered by head, from latents that this rank has for all tokens: (…, G·in_features) → its shard of them.

        Each of `groups` latents, (in_features) wide, is read by neighbouring heads; G are those that this rank's heads read.
        """
        return Expand(in_features, groups, out_features, bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Inputs are this rank's heads or channels; the results of all ranks are summed."""
        return nn.Linear(in_features, out_features, bias)

    def own_channels(self) -> nn.Module:
        """The hidden state itself, sharded like the outputs of `column`; for `project`, together with a `column`."""
        return nn.Identity()

    def project(self, x_SBH: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """The outputs of several `column`, `key_value` and `own_channels` layers that read the same hidden state."""
        return tuple(linear(x_SBH) for linear in linears)

    def norm(self, config: ModelConfig) -> nn.Module:
        """LayerNorm or RMSNorm over the hidden width; RMSNorm never has a bias."""
        if config.norm == "rmsnorm":
            return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)

    def own(self, count: int) -> slice:
        """Which of `count` heads are this rank's."""
        return slice(0, count)

    def own_heads(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        """The rows of this rank's heads in replicated parameters, (N, …) each and of equal shape."""
        return parameters

    def replicated(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        """Parameters that every rank holds, of which each computes a part of the gradient: that of its heads."""
        return parameters

    def exchange_heads(self, x_BNF: Tensor) -> Tensor:
        """All columns (F) of this rank's heads → a share of the columns of all heads; zeros may pad the columns."""
        return x_BNF

    def sum_parts(self, x: Tensor) -> Tensor:
        """The sum over ranks. Every rank uses it in the same way, so its gradient passes through unchanged."""
        return x

    def part_of_sum(self, x: Tensor) -> Tensor:
        """`x`, which is replicated and used in the same way on every rank, but whose gradients are summed over ranks."""
        return x

    def own_tokens(self, x_SBH: Tensor) -> Tensor:
        """This rank's shard of the sequence of a replicated tensor."""
        return x_SBH

    def embedding(self, rows: int, width: int) -> TokenEmbedding:
        """Token ids (B, S) → hidden states (S, B, H); `weight` is (rows, width)."""
        return TokenEmbedding(rows, width)

    def output(self, width: int, rows: int) -> nn.Linear:
        """Holds the weight (rows, width) of an untied output layer."""
        return nn.Linear(width, rows, bias=False)

    def own_logits(self, x_SBH: Tensor, weight_VH: Tensor, vocab_size: int) -> Tensor:
        """Logits of this rank's shard of the vocabulary, (S, B, V), for `logits`, `losses` and objectives."""
        return F.linear(x_SBH, weight_VH)

    def logits(self, own_SBV: Tensor, vocab_size: int) -> Tensor:
        """Logits of the full vocabulary, (B, S, V), float32 or wider."""
        logits_BSV = own_SBV.transpose(0, 1)
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))

    def losses(self, own_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of each label, (B, S) in nats, float32 or wider. It may overwrite the logits: read them before."""
        wide_SBV = own_SBV.to(torch.promote_types(own_SBV.dtype, torch.float32))
        losses = F.cross_entropy(wide_SBV.flatten(0, 1), labels_BS.t().flatten(), reduction="none")
        return losses.view(labels_BS.shape[::-1]).t()

    def normalizers(self, own_SBV: Tensor) -> Tensor:
        """log Σ e^logit over the full vocabulary, (B, S), float32 or wider. It reads a copy of the logits."""
        return wide_copy(own_SBV).logsumexp(-1).t()


def wide_copy(own_SBV: Tensor) -> Tensor:
    """Logits in float32 or wider, which `losses` does not overwrite; −inf, of padding, is the lowest number."""
    wide_SBV = own_SBV.to(torch.promote_types(own_SBV.dtype, torch.float32))
    return wide_SBV.masked_fill(
        wide_SBV == -math.inf, torch.finfo(wide_SBV.dtype).min
    )  # whose backward pass needs the mask only


UNSHARDED = Layers()


class Expand(nn.Linear):
    """A linear layer of `groups` latents, (…, G·in_features) → (…, out_features): equal shares of its outputs read one each."""

    def __init__(self, in_features: int, groups: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.groups = groups

    def forward(self, latents: Tensor) -> Tensor:
        return expanded(latents, self.weight, self.bias, self.groups)


def expanded(latents: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """`Expand` by the weight (out, in)."""
    if groups == 1:
        return F.linear(latents, weight, bias)
    of_groups = weight.unflatten(0, (groups, -1))
    out = torch.einsum("...gc,gwc->...gw", latents.unflatten(-1, (groups, -1)), of_groups).flatten(-2)
    return out if bias is None else out + bias


class TokenEmbedding(nn.Embedding):
    """Token ids (B, S) → hidden states (S, B, H)."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return super().forward(tokens_BS.t())
