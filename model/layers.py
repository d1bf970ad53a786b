"""How all layers of a model are made: unsharded, or a rank's shards of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.auxiliary import AuxiliaryLosses


class Layers:
    """Makes the layers of a model, whole on every rank, from torch's own modules.

    The one thing that tensor parallelism changes in a model: model/parallel/tensor.py overrides all of this. Hidden states that
    come in are whole or, under sequence parallelism, a share of the sequence; what `column` and `key_value` give out belongs to
    this rank's heads or channels, for all tokens; `row` takes that and gives hidden states.
    """

    rank, size = 0, 1
    sequence = False  # whether hidden states are a share of the sequence

    def __init__(self) -> None:
        self.auxiliary = AuxiliaryLosses()

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Outputs that belong to single heads, head by head, or to channels: each rank has a share of them."""
        return nn.Linear(in_features, out_features, bias)

    def key_value(self, in_features: int, heads: int, width: int, bias: bool) -> nn.Module:
        """`heads` outputs of `width` columns, each read by neighbouring query heads; there may be fewer heads than ranks."""
        return nn.Linear(in_features, heads * width, bias)

    def shared(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Outputs that all heads read: wherever the weight lies, every rank gets them whole, for all tokens."""
        return nn.Linear(in_features, out_features, bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        """Inputs of a rank's own heads or channels; the results of all ranks are added up."""
        return nn.Linear(in_features, out_features, bias)

    def own_channels(self) -> nn.Module:
        """The hidden state itself, split like the outputs of `column`; for `project`, beside a `column`."""
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
        """The rows of this rank's heads in parameters that every rank holds whole, (N, …) each and of equal shape."""
        return parameters

    def exchange_heads(self, x_BNF: Tensor) -> Tensor:
        """Some columns (F) of all heads' rows, for all columns of this rank's heads; zeros may fill up columns."""
        return x_BNF

    def sum_parts(self, x: Tensor) -> Tensor:
        """The sum over ranks, of which each then makes the same use: its gradient is passed on as it is."""
        return x

    def part_of_sum(self, x: Tensor) -> Tensor:
        """`x`, which every rank holds whole and makes the same use of, but whose gradients are summed over ranks."""
        return x

    def own_tokens(self, x_SBH: Tensor) -> Tensor:
        """This rank's share of the sequence of a tensor that every rank holds whole."""
        return x_SBH

    def embedding(self, rows: int, width: int) -> TokenEmbedding:
        """Token ids (B, S) → hidden states (S, B, H); `weight` is (rows, width)."""
        return TokenEmbedding(rows, width)

    def output(self, width: int, rows: int) -> nn.Linear:
        """Holds the weight (rows, width) of an output layer that is not the token embedding's."""
        return nn.Linear(width, rows, bias=False)

    def own_logits(self, x_SBH: Tensor, weight_VH: Tensor, vocab_size: int) -> Tensor:
        """(S, B, V), of this rank's part of the vocabulary; for `logits` and `losses`."""
        return F.linear(x_SBH, weight_VH)

    def logits(self, own_SBV: Tensor, vocab_size: int) -> Tensor:
        """Of the whole vocabulary, (B, S, V), float32 or wider."""
        logits_BSV = own_SBV.transpose(0, 1)
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))

    def losses(self, own_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of each token, (B, S), float32 or wider."""
        wide_SBV = own_SBV.to(torch.promote_types(own_SBV.dtype, torch.float32))
        losses = F.cross_entropy(wide_SBV.flatten(0, 1), labels_BS.t().flatten(), reduction="none")
        return losses.view(labels_BS.shape[::-1]).t()


WHOLE = Layers()


class TokenEmbedding(nn.Embedding):
    """Token ids (B, S) → hidden states (S, B, H)."""

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return super().forward(tokens_BS.t())
