"""The attention of every variant as grouped-query attention with biases, which stock architectures have; same outputs.

    ADD   bias of query head i: b_Q + e^Q_i          output bias: b_O + Σ_i W_O,i e^V_i      Q_i·e^K_i is the same for all keys
    ADD of low rank   likewise, and W_Q,i = W_Q + W_i U
    MUL   W_Q,i = diag(c_i) W_Q, c_i = (1 + e^Q_i)(1 + e^K_i)                                W_O,i diag(1 + e^V_i)

With rope and embeddings before the rotation, e^K does not fold into queries, so every head gets its own keys. Embeddings after
the rotation cannot be folded at all. SKV's keys are its values; EL's are the hidden state, so their projection is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import ModelConfig
from configs.targets import load_target
from model.attention.registry import variant_of
from model.positions.registry import position_kind

Read = Callable[[str], Tensor]
Make = Callable[[], Tensor]


class Affine(NamedTuple):
    """y = W x + b."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,), zeros if the model has none


def folded_attention(config: ModelConfig, read: Read, heads: int, kv_heads: int) -> FoldedAttention:
    """The FoldedAttention of the model's variant; ValueError if it has none."""
    stock = variant_of(config).stock
    if stock is None:
        raise ValueError(f"model.attention = {config.attention!r}: has no stock form in its registry entry")
    folded: FoldedAttention = load_target(stock.fold)(config, read, heads, kv_heads)
    return folded


class FoldedAttention:
    """The four projections of one layer, each computed on demand in float64, for `heads` query heads on `kv_heads` heads.

    `read` returns the layer's parameters by their names in its attention module. If `kv_heads` is larger than in the variant's
    stock form, heads are repeated. Heads beyond the model's are zeros; the output projection ignores them.

    A variant folds its parameters into such projections in `own_query`, `own_key`, `own_value` and `own_output`.
    """

    def __init__(self, config: ModelConfig, read: Read, heads: int, kv_heads: int) -> None:
        self.config, self._read = config, read
        self.width, self.heads = config.head_width, config.num_heads
        self._query_rows, self._key_rows = heads * self.width, kv_heads * self.width

    def query(self) -> Affine:
        """(N·D, H)."""
        return _filled_up(self.own_query(), self._query_rows)

    def key(self) -> Affine:
        """(K·D, H)."""
        return self._spread(self.own_key())

    def value(self) -> Affine:
        """(K·D, H)."""
        return self._spread(self.own_value())

    def output(self) -> Affine:
        """(H, N·D)."""
        weight, bias = self.own_output()
        return Affine(F.pad(weight, (0, self._query_rows - weight.shape[1])), bias)

    def own_query(self) -> Affine:
        """The query projection of the model's own heads, head by head."""
        return self.linear("query")

    def own_key(self) -> Affine:
        """The key projection, with as many heads as the variant's stock form has."""
        raise NotImplementedError

    def own_value(self) -> Affine:
        """The value projection, with as many heads as `own_key`."""
        raise NotImplementedError

    def own_output(self) -> Affine:
        """The output projection of the model's own heads."""
        return self.linear("out")

    def linear(self, name: str) -> Affine:
        """A linear layer, with a zero bias if it has none."""
        weight = self.wide(f"{name}.weight")
        bias = self.wide(f"{name}.bias") if self.config.bias else weight.new_zeros(weight.shape[0])
        return Affine(weight, bias)

    def wide(self, name: str) -> Tensor:
        return self._read(name).double()

    def _spread(self, folded: Affine) -> Affine:
        """Repeated to the stock architecture's number of heads, but never beyond the number of query heads."""
        times = min(self._key_rows, self.heads * self.width) // folded.bias.shape[0]
        spread = (part.unflatten(0, (-1, self.width)).repeat_interleave(times, dim=0).flatten(0, 1) for part in folded)
        return _filled_up(Affine(*spread), self._key_rows)


class FoldedGroupedQuery(FoldedAttention):
    """MHA, GQA, MQA, unchanged."""

    def own_key(self) -> Affine:
        return self._key_or_value(0)

    def own_value(self) -> Affine:
        return self._key_or_value(1)

    def _key_or_value(self, which: int) -> Affine:
        parts = self.linear("key_value")
        return Affine(*(part.unflatten(0, (-1, 2, self.width))[:, which].flatten(0, 1) for part in parts))


class FoldedSharedKeyValue(FoldedAttention):
    """SKV: keys are values."""

    def own_key(self) -> Affine:
        return self.linear("key_value")

    def own_value(self) -> Affine:
        return self.linear("key_value")


class FoldedHiddenState(FoldedAttention):
    """EL: keys and values are the hidden state."""

    def own_key(self) -> Affine:
        hidden = self.config.hidden_size
        return Affine(torch.eye(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64))

    def own_value(self) -> Affine:
        return self.own_key()


class FoldedSingleHead(FoldedAttention):
    """SHA: one projection of Q, K and V for all heads."""

    def own_query(self) -> Affine:
        return self.to_heads(self.part_of_qkv(0))

    def own_key(self) -> Affine:
        return self.part_of_qkv(1)

    def own_value(self) -> Affine:
        return self.part_of_qkv(2)

    def part_of_qkv(self, which: int) -> Affine:
        """One of the three, seed by seed, (G·D, H)."""
        return Affine(*(part.unflatten(0, (-1, 3, self.width))[:, which].flatten(0, 1) for part in self.linear("qkv")))

    def to_heads(self, shared: Affine) -> Affine:
        """Each head's copy of its seed's projection, (N·D, H)."""
        times = self.heads * self.width // len(shared.bias)
        return Affine(*(part.unflatten(0, (-1, self.width)).repeat_interleave(times, dim=0).flatten(0, 1) for part in shared))


class FoldedEmbeddings(FoldedSingleHead):
    """MHE: the shared projection with the embeddings of each head."""

    @property
    def expanded(self) -> bool:
        """Whether e^K is rotated, so that it stays with the keys and every head has its own."""
        return position_kind(self.config).rotates and self.config.key_embedding and self.config.head_embeddings

    def own_query(self) -> Affine:
        if not self.config.head_embeddings:
            return super().own_query()
        return self.embedded(self.part_of_qkv(0), self.query_embedding())

    def own_key(self) -> Affine:
        key = self.part_of_qkv(1)
        return self.embedded(key, self.wide("key_embedding")) if self.expanded else key

    def query_embedding(self) -> Tensor:
        """The query embedding (N, D), with e^K folded in."""
        return self.wide("query_embedding")

    def embedded(self, shared: Affine, e_ND: Tensor) -> Affine:
        """The seeds' projection of width G·D, expanded to each head with its embedding."""
        raise NotImplementedError


class FoldedAdd(FoldedEmbeddings):
    """MHE-ADD: embeddings are biases."""

    def embedded(self, shared: Affine, e_ND: Tensor) -> Affine:
        weight, bias = self.to_heads(shared)
        return Affine(weight, bias + e_ND.flatten())

    def own_output(self) -> Affine:
        weight, bias = self.linear("out")
        if not self.config.head_embeddings:
            return Affine(weight, bias)
        return Affine(weight, bias + weight @ self.wide("value_embedding").flatten())


class FoldedLowRank(FoldedAdd):
    """mhe_low_rank: the product of low rank becomes a part of each head's query projection."""

    def own_query(self) -> Affine:
        weight, bias = super().own_query()
        if not self.config.query_rank:
            return Affine(weight, bias)
        up, down = self.linear("query"), self.linear("query_down")
        return Affine(weight + up.weight @ down.weight, bias + up.weight @ down.bias + up.bias)


class FoldedMul(FoldedEmbeddings):
    """MHE-MUL: embeddings scale rows and columns."""

    def query_embedding(self) -> Tensor:
        e_query = self.wide("query_embedding")
        if self.expanded or not self.config.key_embedding:
            return e_query
        e_key = self.wide("key_embedding")
        return e_query + e_key + e_query * e_key

    def embedded(self, shared: Affine, e_ND: Tensor) -> Affine:
        weight, bias = self.to_heads(shared)
        scale = 1 + e_ND.flatten()
        return Affine(scale[:, None] * weight, scale * bias)

    def own_output(self) -> Affine:
        weight, bias = self.linear("out")
        if not self.config.head_embeddings:
            return Affine(weight, bias)
        return Affine(weight * (1 + self.wide("value_embedding").flatten()), bias)


def _filled_up(projection: Affine, rows: int) -> Affine:
    """The projection, padded with zero rows."""
    more = rows - projection.bias.shape[0]
    return Affine(F.pad(projection.weight, (0, 0, 0, more)), F.pad(projection.bias, (0, more)))
