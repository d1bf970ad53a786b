"""What a rank computes of one micro-batch: matrix products, attention, and bytes that pass through memory. Torch-free.

Each is counted from the configuration, layer by layer; `pretrain/planning/rates.py` turns it into seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from configs.schema import ModelConfig
from model.attention.faults import may_share_scores
from model.attention.registry import projections_of, variant_of
from model.attention.variant import Projection
from model.costs.communication import Gather
from model.costs.flops import attention_cost, layer_pairs
from model.costs.parameters import mlp_matrices, norm_vectors, vocabulary

HEAD_MULTIPLE = 32  # fused attention kernels compute heads as wide as a multiple of this
WIDEST_HEAD = 256
LOSS_BYTES = 26  # for each logit: to fp32, log-softmax, and both ways back; the product itself is counted as such
OPTIMIZER_BYTES = 44  # for each value that a rank steps: AdamW reads 16 and writes 12, the rest is norm, scale, cast and zero


@dataclass(frozen=True)
class Share:
    """What of a micro-batch one rank computes.

    `samples` of `length` tokens each, on one of `tensor` ranks, which with `sequence` have a share of the tokens outside of
    attention and MLP; on one of `context` ranks, each of which has a share of every sample. `gather`: what tensor-parallel
    ranks gather of shared projections. `value`: bytes of an activation. `compiled`: element-wise operations run in one pass.
    `plain_norms`: norms of several passes, as torch had until 2.8. `shares_scores`: heads that may share scores do, whatever
    kernel is asked for, as on CPUs.
    """

    samples: int
    length: int
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    gather: Gather = "weights"
    shares_scores: bool = False
    value: int = 2
    compiled: bool = False
    plain_norms: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the rank's micro-batch."""
        return self.samples * self.length // self.context

    @property
    def own_tokens(self) -> float:
        """Tokens whose norms and residuals the rank computes."""
        return self.tokens / (self.tensor if self.sequence else 1)


@dataclass(frozen=True)
class Product:
    """A product of rows × inner with inner × columns."""

    rows: float
    columns: float
    inner: float

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.columns * self.inner

    def backward(self) -> tuple[Product, Product]:
        """The gradients of its two factors."""
        return Product(self.rows, self.inner, self.columns), Product(self.inner, self.columns, self.rows)


@dataclass(frozen=True)
class Attention:
    """What the heads of a layer compute of queries and keys.

    `flops` and `exponentials` are those of the forward pass that the kernel executes, tiles of its own width included; `kernel`
    is flash, math (a score in memory for each pair) or shared (one softmax matrix for all heads). `length`: keys of a query.
    """

    kernel: str
    flops: float
    exponentials: float
    length: int


@dataclass(frozen=True)
class Work:
    """One layer, or what is around all layers, in the forward pass; `forward` and `backward`: bytes of element-wise passes.

    `launches` are kernels of the forward pass.
    """

    products: tuple[Product, ...] = ()
    attention: tuple[Attention, ...] = ()
    forward: float = 0
    backward: float = 0
    launches: int = 0


@lru_cache(4096)
def layer_work(layer: ModelConfig, share: Share) -> Work:
    """One block: attention and MLP with their norms and residuals."""
    mlp = layer.ffn_width / share.tensor
    products = (
        *_projections(layer, share),
        Product(share.tokens, layer.hidden_size, layer.num_heads * layer.head_width / share.tensor),
        *[Product(share.tokens, mlp, layer.hidden_size)] * (mlp_matrices(layer) - 1),
        Product(share.tokens, layer.hidden_size, mlp),
    )
    forward, backward = _passes(layer, share)
    launches = (12 if share.compiled else 30) + len(products)
    return Work(products, (_attention(layer, share),), forward, backward, launches)


def embedding_work(config: ModelConfig, share: Share) -> Work:
    """The token embedding: rows are copied, and their gradients added."""
    moved = share.own_tokens * config.hidden_size
    return Work(forward=2 * share.value * moved, backward=(share.value + 8) * moved, launches=4)


def output_work(config: ModelConfig, share: Share) -> Work:
    """The last norm, the output layer and the loss."""
    rows = vocabulary(config) / share.tensor
    norm_forward, norm_backward = _norm(config, share)
    logits = LOSS_BYTES * share.tokens * rows / 2
    return Work(
        products=(Product(share.tokens, rows, config.hidden_size),),
        forward=norm_forward * share.own_tokens * config.hidden_size + logits,
        backward=norm_backward * share.own_tokens * config.hidden_size + logits,
        launches=16,
    )


def _projections(layer: ModelConfig, share: Share) -> Iterator[Product]:
    """A layer's projections, without that of its output; also those along the sequence, if it has any."""
    for one in projections_of(layer).values():
        if one.columns:
            inner = one.inputs or layer.hidden_size
            rows, columns = _sharded(one, share)
            yield Product(rows, columns, inner)
    variant = variant_of(layer)
    if variant.projected_keys is not None:
        yield Product(variant.projected_keys(layer), sum(variant.products(layer)) * share.samples / share.tensor, share.length)


def _sharded(one: Projection, share: Share) -> tuple[float, float]:
    """How many rows and columns of a projection's output a tensor-parallel rank computes."""
    if one.is_gathered(share.tensor) and share.gather == "weights":
        return (share.own_tokens, one.columns) if share.sequence else (share.tokens, one.columns)
    if one.kind == "key_value" and one.parts % share.tensor:
        return share.tokens, one.width * math.ceil(one.parts / share.tensor)
    return share.tokens, one.columns / share.tensor


def _attention(layer: ModelConfig, share: Share) -> Attention:
    pairs = layer_pairs(layer, share.length) * share.samples / share.tensor / share.context
    variant, heads = variant_of(layer), layer.num_heads
    maps = heads * variant.softmaxes
    length = layer.sliding_window or share.length
    if (layer.attention_kernel == "shared_scores" or share.shares_scores) and may_share_scores(layer):
        flops, exponentials = attention_cost(layer, 1, backward=False, shares_scores=True)
        return Attention("shared", pairs * flops, pairs * exponentials, length)
    if layer.attention_kernel == "math" or layer.logit_softcap is not None:
        every = share.length**2 * share.samples / share.tensor / share.context
        return Attention("math", 2 * every * sum(variant.products(layer)), every * maps, length)
    queries, values = (width / maps for width in variant.products(layer))
    width = max(queries, values)
    padded = HEAD_MULTIPLE * math.ceil(width / HEAD_MULTIPLE) if width <= WIDEST_HEAD else width
    masked = layer.position == "alibi" or layer.sliding_window is not None or layer.separates_documents
    every = pairs * (2 if masked and variant.projected_keys is None else 1)  # with a mask in memory, no tile is left out
    return Attention("flash", 4 * every * maps * padded, every * maps, length)


def _passes(layer: ModelConfig, share: Share) -> tuple[float, float]:
    """Bytes of element-wise operations of a block, forward and backward."""
    value, tensor, hidden = share.value, share.tensor, layer.hidden_size
    norm_forward, norm_backward = _norm(layer, share)
    residual = 2 * (3 * value + (3 * value if layer.dropout else 0))
    own = share.own_tokens * hidden
    forward, backward = own * (2 * norm_forward + residual), own * (2 * norm_backward + residual)
    for values, of_forward, of_backward in _values(layer, share.compiled, value):
        forward += share.tokens * values / tensor * of_forward
        backward += share.tokens * values / tensor * of_backward
    return forward, backward


def _values(layer: ModelConfig, compiled: bool, value: int) -> Iterator[tuple[float, float, float]]:
    """Per token and operation: how many values it has, and how many bytes it moves for each, forward and backward."""
    variant, cached = variant_of(layer), variant_of(layer).cached(layer)
    queries, values = variant.products(layer)
    outputs = layer.num_heads * layer.head_width
    embedded = variant.embeddings(layer) > 0
    keys = cached.key_heads * cached.key_width
    yield queries + values + keys + cached.value_heads * cached.value_width, value, 3 * value  # the attention kernel itself
    yield outputs, 2 * value, 2 * value  # heads are put side by side
    if layer.position == "rope":
        heads = layer.num_seeds if embedded and layer.embedding_position == "after" else layer.num_heads
        rotated = (heads + cached.key_heads) * variant.rotary_width(layer) * layer.rope_fraction
        yield (rotated, 2 * value, 2 * value) if compiled else (rotated, 2 * value + 34, 2 * value + 34)
    if layer.qk_norm:
        yield variant.normed_width(layer) * 2, 2 * value, 4 * value
    if embedded:  # of queries, which are broadcast, and of the heads' outputs
        yield queries + outputs, 1.5 * value, (1.5 if compiled else 2.5) * value
    if layer.output_gate is not None:
        yield outputs, (3 if compiled else 5) * value, (5 if compiled else 7) * value
    if layer.activation == "swiglu":
        yield layer.ffn_width, (3 if compiled else 5) * value, (5 if compiled else 9) * value
    else:
        yield layer.ffn_width, 2 * value, 3 * value


def _norm(config: ModelConfig, share: Share) -> tuple[float, float]:
    """Bytes that a norm moves for each value, forward and backward."""
    if config.norm == "rmsnorm" and share.plain_norms and not share.compiled:
        return 2 * share.value + 26, 4 * share.value + 52
    return 2 * share.value, 4 * share.value + norm_vectors(config)
