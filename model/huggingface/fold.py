"""The attention of every variant as grouped-query attention with biases, which stock software has: the same outputs.

    ADD   bias of query head i: b_Q + e^Q_i          output bias: b_O + Σ_i W_O,i e^V_i      Q_i·e^K_i is the same for all keys
    MUL   W_Q,i = diag(c_i) W_Q, c_i = (1 + e^Q_i)(1 + e^K_i)                                W_O,i diag(1 + e^V_i)

With rope and embeddings before the rotation, e^K does not fold into queries: then every head gets keys of its own. Embeddings
after the rotation fold nowhere. SKV's keys are its values; EL's are the hidden state, so their projection is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.registry import attention_variant

Read = Callable[[str], Tensor]
Make = Callable[[], Tensor]


class Affine(NamedTuple):
    """y = W x + b."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out,), zeros where the model has none


def folded_kv_heads(config: ModelConfig) -> int | None:
    """Key/value heads of the stock attention; None where there is no such attention."""
    if config.attention not in ("mhe_add", "mhe_mul"):
        return config.num_heads if config.attention in ("skv", "el") else attention_variant(config.attention).kv_heads(config)
    if config.position != "rope":
        return 1
    if config.embedding_position == "after":
        return None
    return config.num_heads if config.key_embedding else 1


class FoldedAttention:
    """The four projections of one layer, each made in float64 when it is asked for, with `heads` on `kv_heads` heads.

    `read` gives the layer's parameters by their names in its attention module. `kv_heads` may be more than
    `folded_kv_heads`: heads are repeated then. Heads beyond the model's are zeros, which the output projection does not read.
    """

    def __init__(self, config: ModelConfig, read: Read, heads: int, kv_heads: int) -> None:
        self.config, self._read = config, read
        self.width, self.heads = config.head_width, config.num_heads
        self._query_rows, self._key_rows = heads * self.width, kv_heads * self.width
        kind = config.attention
        self._embedded = kind in ("mhe_add", "mhe_mul")
        self._shared = self._embedded or kind == "sha"  # one projection of Q, K and V for all heads
        self._expanded = self._embedded and folded_kv_heads(config) == config.num_heads != 1

    def query(self) -> Affine:
        """(N·D, H)."""
        return _filled_up(self._query(), self._query_rows)

    def _query(self) -> Affine:
        if not self._shared:
            return self._linear("query")
        query = self._part_of_qkv(0)
        if not self._embedded:
            return _repeated(query, self.heads)
        e_query = self._wide("query_embedding")
        if self.config.attention == "mhe_mul" and not self._expanded and self.config.key_embedding:
            e_key = self._wide("key_embedding")
            e_query = e_query + e_key + e_query * e_key
        return self._with_embeddings(query, e_query)

    def key(self) -> Affine:
        """(K·D, H)."""
        if self._expanded:
            return _filled_up(self._with_embeddings(self._part_of_qkv(1), self._wide("key_embedding")), self._key_rows)
        return self._spread(self._key_or_value(0))

    def value(self) -> Affine:
        """(K·D, H)."""
        return self._spread(self._key_or_value(1))

    def output(self) -> Affine:
        """(H, N·D)."""
        weight, bias = self._linear("out")
        if self._embedded:
            e_value = self._wide("value_embedding").flatten()
            if self.config.attention == "mhe_add":
                bias = bias + weight @ e_value
            else:
                weight = weight * (1 + e_value)
        return Affine(F.pad(weight, (0, self._query_rows - weight.shape[1])), bias)

    def _key_or_value(self, which: int) -> Affine:
        if self._shared:
            return self._part_of_qkv(1 + which)
        if self.config.attention == "el":
            hidden = self.config.hidden_size
            return Affine(torch.eye(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64))
        weight, bias = self._linear("key_value")
        if self.config.attention == "skv":
            return Affine(weight, bias)
        return Affine(*(part.unflatten(0, (-1, 2, self.width))[:, which].flatten(0, 1) for part in (weight, bias)))

    def _spread(self, folded: Affine) -> Affine:
        """As the host's heads: repeated, but no more than there are query heads."""
        times = min(self._key_rows, self.heads * self.width) // folded.bias.shape[0]
        spread = (part.unflatten(0, (-1, self.width)).repeat_interleave(times, dim=0).flatten(0, 1) for part in folded)
        return _filled_up(Affine(*spread), self._key_rows)

    def _with_embeddings(self, shared: Affine, e_ND: Tensor) -> Affine:
        """One projection of width D as that of each head with its embedding."""
        weight, bias = shared
        if self.config.attention == "mhe_add":
            return Affine(weight.repeat(self.heads, 1), (bias + e_ND).flatten())
        return Affine(((1 + e_ND)[:, :, None] * weight).flatten(0, 1), ((1 + e_ND) * bias).flatten())

    def _part_of_qkv(self, which: int) -> Affine:
        return Affine(*(part.chunk(3)[which] for part in self._linear("qkv")))

    def _linear(self, name: str) -> Affine:
        weight = self._wide(f"{name}.weight")
        bias = self._wide(f"{name}.bias") if self.config.bias else weight.new_zeros(weight.shape[0])
        return Affine(weight, bias)

    def _wide(self, name: str) -> Tensor:
        return self._read(name).double()


def _filled_up(projection: Affine, rows: int) -> Affine:
    """With zeros behind it."""
    more = rows - projection.bias.shape[0]
    return Affine(F.pad(projection.weight, (0, 0, 0, more)), F.pad(projection.bias, (0, more)))


def _repeated(head: Affine, heads: int) -> Affine:
    return Affine(head.weight.repeat(heads, 1), head.bias.repeat(heads))
