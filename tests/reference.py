"""The decoder straight from the papers' formulas: float64, loops over heads, explicit softmax. Shares nothing with `model`.

Weights come as a dictionary of parameter names, so that gradients of both sides can be compared name by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig

ALIBI_SLOPES = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    3: [2**-4, 2**-8, 2**-2],
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
    8: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8],
}


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rope(x: Tensor, theta: float, places: Sequence[int], fraction: float = 1.0) -> Tensor:
    """Channels c and c + D/2 of a row at place t as a complex number, turned by the angle t · theta^(-2c/r) if c < r/2.

    r = `fraction` · D.
    """
    length, width = x.shape
    half, rotated = width // 2, round(fraction * width)
    angles = [[t * theta ** (-2 * c / rotated) if c < rotated // 2 else 0.0 for c in range(half)] for t in places[:length]]
    turn = torch.polar(torch.ones(length, half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=1)


def one_head(q: Tensor, k: Tensor, v: Tensor, sight: Sight, nothing: Tensor) -> Tensor:
    """Softmax attention of one head of one sequence; `nothing` is the result of a query that sees no key.

    Scores are divided by the square root of the width of q. A soft-cap is that of Gemma 2 (arXiv 2408.00118), before slopes; a
    sink is one more term of the denominator, as in gpt-oss (arXiv 2508.10925).
    """
    rows = []
    for t, keys in enumerate(sight.visible):
        if not keys:
            rows.append(nothing)
            continue
        scores = k[keys] @ q[t] / math.sqrt(q.shape[1])
        if sight.softcap is not None:
            scores = sight.softcap * torch.tanh(scores / sight.softcap)
        scores = scores - sight.slope * (t - torch.tensor(keys, dtype=torch.float64))
        weights = torch.exp(scores - scores.max())
        total = weights.sum() if sight.sink is None else weights.sum() + torch.exp(sight.sink - scores.max())
        rows.append((weights / total) @ v[keys])
    return torch.stack(rows)


QKV = tuple[Tensor, Tensor, Tensor]


def own_heads(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int, kv_heads: int) -> QKV:
    """MHA, GQA, MQA: Q of each head, K and V of `kv_heads` groups of neighbours."""
    group = head // (config.num_heads // kv_heads)
    key, value = split(linear(x, weights, "key_value"), 2 * kv_heads)[2 * group : 2 * group + 2]
    return split(linear(x, weights, "query"), config.num_heads)[head], key, value


def own_queries(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int, key_value: Tensor) -> QKV:
    """SKV, EL: K and V are the same tensor."""
    both = split(key_value, config.num_heads)[head]
    return split(linear(x, weights, "query"), config.num_heads)[head], both, both


def one_projection(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> QKV:
    """SHA and MHE: the same Q, K, V for each head of a seed."""
    seed = head // (config.num_heads // config.num_seeds)
    query, key, value = split(split(linear(x, weights, "qkv"), config.num_seeds)[seed], 3)
    return query, key, value


def split(x: Tensor, parts: int) -> list[Tensor]:
    width = x.shape[1] // parts
    return [x[:, part * width : (part + 1) * width] for part in range(parts)]


# Each variant's Q_i, K_i, V_i of head i, before embeddings and rotation.
HEADS: dict[str, Callable[[ModelConfig, Tensor, dict[str, Tensor], int], QKV]] = {
    "mha": lambda config, x, weights, head: own_heads(config, x, weights, head, config.num_heads),
    "gqa": lambda config, x, weights, head: own_heads(config, x, weights, head, config.num_kv_heads or 0),
    "mqa": lambda config, x, weights, head: own_heads(config, x, weights, head, 1),
    "skv": lambda config, x, weights, head: own_queries(config, x, weights, head, linear(x, weights, "key_value")),
    "el": lambda config, x, weights, head: own_queries(config, x, weights, head, x),
    "sha": one_projection,
    "mhe_add": one_projection,
    "mhe_mul": one_projection,
}


def embed_head(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], name: str, head: int) -> Tensor:
    """Equations of MHE-ADD and MHE-MUL (arXiv 2310.07911, section 3); K_i = k where key_embedding is false."""
    if not config.head_embeddings or (name == "key_embedding" and not config.key_embedding):
        return x
    if config.attention == "mhe_add":
        return x + weights[name][head]
    if config.attention == "mhe_mul":
        return x * (weights[name][head] + 1)
    return x


def attention(
    config: ModelConfig,
    batch: Tensor,
    weights: dict[str, Tensor],
    *,
    source: Tensor | None = None,
    causal: bool = True,
    valid_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """One attention layer; `weights` by the names inside the layer. Keys and values are those of `source`, another batch, or of
    `batch` itself.

    A query sees the keys that are valid, of its document and, if `causal`, not later than itself. Places count from the first
    token of a document. ALiBi's bias is linear in the
    distance t - j, which is negative for a later key: the paper defines it for earlier keys only.
    """
    sequences = []
    for number, x in enumerate(batch):
        y = x if source is None else source[number]
        valid = [True] * len(y) if valid_BT is None else valid_BT[number].tolist()
        documents = [0] * max(len(x), len(y)) if documents_BT is None else documents_BT[number].tolist()
        places = [t - documents.index(document) for t, document in enumerate(documents)]  # from its first token
        visible = [
            [
                j
                for j in range(len(y))
                if valid[j]
                and documents[j] == documents[t]
                and (j <= t or not causal)
                and t - j < (config.sliding_window or 999)
            ]
            for t in range(len(x))
        ]
        heads = []
        for head in range(config.num_heads):
            slope = ALIBI_SLOPES[config.num_heads][head] if config.position == "alibi" else 0.0
            formula = OWN.get(str(config.attention), ordinary_head)
            sink = weights["sink"][head, 0] if config.attention_sinks else None
            sight = Sight(places, visible, slope, config.logit_softcap, sink)
            output = formula(config, x, y, weights, head, sight)
            heads.append(output * gate(config, x, weights, head) if config.output_gate else output)
        sequences.append(linear(torch.cat(heads, dim=1), weights, "out"))
    return torch.stack(sequences)


@dataclass(frozen=True)
class Sight:
    """The place of each token, the keys that each query sees, the head's slope with ALiBi, its soft-cap and its sink."""

    places: list[int]
    visible: list[list[int]]
    slope: float
    softcap: float | None = None
    sink: Tensor | None = None


def ordinary_head(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """One head of one sequence, (T, d): softmax attention of Q_i of x with K_i and V_i of y, as `HEADS` gives them."""
    formula = HEADS[str(config.attention)]
    (q, _, _), (_, k, v) = formula(config, x, weights, head), formula(config, y, weights, head)
    if config.qk_norm:
        q, k = rms_norm(config, q, weights, "query_norm"), rms_norm(config, k, weights, "key_norm")
    if config.position == "rope" and config.embedding_position == "after":
        q, k = turned(config, q, sight), turned(config, k, sight)
    q = embed_head(config, q, weights, "query_embedding", head)
    k = embed_head(config, k, weights, "key_embedding", head)
    v = embed_head(config, v, weights, "value_embedding", head)
    if config.position == "rope" and config.embedding_position == "before":
        q, k = turned(config, q, sight), turned(config, k, sight)
    # Heads of no key are zero before e^V is added; with a sink, whose value is zero, e^V is added to no value.
    nothing = torch.zeros_like(v[0])
    if sight.sink is None:
        nothing = embed_head(config, nothing, weights, "value_embedding", head)
    return one_head(q, k, v, sight, nothing)


def turned(config: ModelConfig, x: Tensor, sight: Sight) -> Tensor:
    return rope(x, config.rope_theta, sight.places, config.rope_fraction)


# Variants whose heads are more than softmax attention of one query, key and value each.
OWN: dict[str, Callable[[ModelConfig, Tensor, Tensor, dict[str, Tensor], int, Sight], Tensor]] = {}


def gate(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> Tensor:
    """The gates of a head's output, (T, d) or (T, 1) (arXiv 2505.06708, equation 5)."""
    return 1 / (1 + torch.exp(-split(linear(x, weights, "output_gate"), config.num_heads)[head]))


def rms_norm(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + config.norm_epsilon) * weights[f"{name}.weight"]


def norm(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + config.norm_epsilon) * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def mlp(config: ModelConfig, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    up = linear(x, weights, "up")
    if config.activation == "gelu":
        return linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), weights, "down")
    gate = linear(x, weights, "gate")
    return linear(gate / (1 + torch.exp(-gate)) * up, weights, "down")


def below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def layer_of(config: ModelConfig, number: int) -> ModelConfig:
    """The configuration of a layer, counted from 1, of those that differ by their number."""
    changes: dict[str, object] = {}
    if config.no_position_every and number % config.no_position_every == 0:
        changes |= {"position": "none", "embedding_position": "after"}
    if config.full_attention_every and number % config.full_attention_every == 0:
        changes["sliding_window"] = None
    return config.model_copy(update=changes)


def logits(config: ModelConfig, tokens_BS: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The whole model without dropout."""
    x = weights["token_embedding.weight"][tokens_BS]
    if config.position == "learned":
        x = x + weights["position_embedding.weight"][: tokens_BS.shape[1]]
    for number in range(config.num_layers):
        block = below(weights, f"blocks.{number}.")
        x = x + attention(layer_of(config, number + 1), norm(config, x, block, "attention_norm"), below(block, "attention."))
        x = x + mlp(config, norm(config, x, block, "mlp_norm"), below(block, "mlp."))
    output = weights["token_embedding.weight" if config.tie_embeddings else "output.weight"]
    return norm(config, x, weights, "final_norm") @ output.T


def losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """−log probability of each label."""
    chosen = logits_BSV.gather(-1, labels_BS[..., None])[..., 0]
    return torch.logsumexp(logits_BSV, dim=-1) - chosen
