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


def factored_queries(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> QKV:
    """MFA (arXiv 2412.19255): MQA with Q_i = norm(x S) W_i."""
    latent = rms_norm(config, linear(x, weights, "query_down"), weights, "query_down_norm")
    key, value = split(linear(x, weights, "key_value"), 2)
    return split(linear(latent, weights, "query"), config.num_heads)[head], key, value


def one_projection_and_low_rank(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> QKV:
    """MHE-ADD with Q_i = q + x U W_i, before the embedding."""
    query, key, value = one_projection(config, x, weights, head)
    if config.query_rank:
        query = query + split(linear(linear(x, weights, "query_down"), weights, "query"), config.num_heads)[head]
    return query, key, value


def tensor_products(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> QKV:
    """TPA (arXiv 2501.06425, equation 3.1): row i of the mean of the outer products a_r ⊗ b_r, r = 1 … R."""
    ranks = [config.query_rank or 0, config.key_rank or 0, config.value_rank or 0]
    of_heads, of_channels = [], []
    for name in ("query", "key_value"):
        own = split(linear(x, weights, f"{name}_head_factors"), config.num_heads)[head]
        of_heads += split(own, own.shape[1])
        of_channels += split(linear(x, weights, f"{name}_channel_factors"), own.shape[1])
    products = torch.stack([a * b for a, b in zip(of_heads, of_channels, strict=True)])
    query, key, value = (of_a_kind.mean(dim=0) for of_a_kind in products.split(ranks))
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
    "mfa": factored_queries,
    "mhe_low_rank": one_projection_and_low_rank,
    "tpa": tensor_products,
}


def embed_head(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], name: str, head: int) -> Tensor:
    """Equations of MHE-ADD and MHE-MUL (arXiv 2310.07911, section 3); K_i = k where key_embedding is false."""
    if not config.head_embeddings or (name == "key_embedding" and not config.key_embedding):
        return x
    if config.attention in ("mhe_add", "mhe_low_rank"):
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
    number: int = 0,
) -> Tensor:
    """Attention layer `number`, from 0; `weights` by the names inside the layer.

    Keys and values are those of `source`, another batch, or of `batch` itself. A query sees the keys that are valid, of its
    document and, if `causal`, not later than itself. Places count from the first token of a document. ALiBi's bias is linear in
    the distance t - j, which is negative for a later key: the paper defines it for earlier keys only.
    """
    sequences = []
    for row, x in enumerate(batch):
        y = x if source is None else source[row]
        valid = [True] * len(y) if valid_BT is None else valid_BT[row].tolist()
        documents = [0] * max(len(x), len(y)) if documents_BT is None else documents_BT[row].tolist()
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
            sight = Sight(places, visible, slope, number, config.logit_softcap, sink)
            output = formula(config, x, y, weights, head, sight)
            heads.append(output * gate(config, x, weights, head) if config.output_gate else output)
        sequences.append(linear(torch.cat(heads, dim=1), weights, "out"))
    return torch.stack(sequences)


@dataclass(frozen=True)
class Sight:
    """The place of each token, the keys that each query sees, the head's slope with ALiBi, the layer, soft-cap and sink."""

    places: list[int]
    visible: list[list[int]]
    slope: float
    layer: int
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


def softmax_map(config: ModelConfig, q: Tensor, k: Tensor, weights: dict[str, Tensor], sight: Sight) -> Tensor:
    """softmax(q kᵀ / √width), (T, T): what one-hot values become. Rows that see no key are zero."""
    if config.qk_norm:
        q, k = rms_norm(config, q, weights, "query_norm"), rms_norm(config, k, weights, "key_norm")
    if config.position == "rope":
        q, k = turned(config, q, sight), turned(config, k, sight)
    one_hot = torch.eye(len(k), dtype=torch.float64)
    return one_head(q, k, one_hot, sight, torch.zeros_like(one_hot[0]))


def grouped_key_value(config: ModelConfig, y: Tensor, weights: dict[str, Tensor], head: int) -> list[Tensor]:
    """K and V that the head reads, of num_kv_heads, or of its own."""
    count = config.num_kv_heads or config.num_heads
    group = head // (config.num_heads // count)
    return split(linear(y, weights, "key_value"), 2 * count)[2 * group : 2 * group + 2]


def differential(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """arXiv 2410.05258, equations 1 to 3: (1 − λ_init) · norm((A_1 − λ A_2) V) of halves of Q and K."""
    q = split(linear(x, weights, "query"), config.num_heads)[head]
    k, v = grouped_key_value(config, y, weights, head)
    first, second = (softmax_map(config, *pair, weights, sight) for pair in zip(split(q, 2), split(k, 2), strict=True))
    start = 0.8 - 0.6 * math.exp(-0.3 * sight.layer)  # l - 1 in the paper, where the first layer is 1
    dots = [(weights[f"lambdas.lambda_q{part}"] * weights[f"lambdas.lambda_k{part}"]).sum() for part in (1, 2)]
    mixed = (first - (torch.exp(dots[0]) - torch.exp(dots[1]) + start) * second) @ v
    return (1 - start) * rms_norm(config, mixed, weights, "head_norm")


def differential_v2(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """Ye et al., January 2026: attention of query head 2i minus sigmoid(λ) times that of 2i + 1; λ of each token and head."""
    queries = split(linear(x, weights, "query"), 2 * config.num_heads)[2 * head : 2 * head + 2]
    k, v = grouped_key_value(config, y, weights, head)
    first, second = (softmax_map(config, q, k, weights, sight) for q in queries)
    gate = 1 / (1 + torch.exp(-split(linear(x, weights, "lambdas"), config.num_heads)[head]))
    return (first - gate * second) @ v


def linformer(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """arXiv 2006.04768, equation 7 with headwise sharing: softmax(Q (E K)ᵀ / √d) F V over the tokens that queries may see."""
    (q, _, _), (_, k, v) = (own_heads(config, z, weights, head, config.num_heads) for z in (x, y))
    if config.qk_norm:
        q, k = rms_norm(config, q, weights, "query_norm"), rms_norm(config, k, weights, "key_norm")
    if config.position == "rope":
        q, k = turned(config, q, sight), turned(config, k, sight)
    seen = sight.visible[0]
    assert all(keys == seen for keys in sight.visible), "all tokens are mixed, so all queries see the same"
    keys, values = weights["sequence.key"][:, seen] @ k[seen], weights["sequence.value"][:, seen] @ v[seen]
    scores = torch.exp(q @ keys.T / math.sqrt(q.shape[1]))
    return scores / scores.sum(dim=1, keepdim=True) @ values


# Variants whose heads are more than softmax attention of one query, key and value each.
OWN: dict[str, Callable[[ModelConfig, Tensor, Tensor, dict[str, Tensor], int, Sight], Tensor]] = {
    "diff": differential,
    "diff_v2": differential_v2,
    "linformer": linformer,
}


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
        names = [config.attention] if isinstance(config.attention, str) else config.attention
        layer = layer_of(config, number + 1).model_copy(update={"attention": names[number % len(names)]})
        x = x + attention(layer, norm(config, x, block, "attention_norm"), below(block, "attention."), number=number)
        x = x + mlp(config, norm(config, x, block, "mlp_norm"), below(block, "mlp."))
    output = weights["token_embedding.weight" if config.tie_embeddings else "output.weight"]
    return norm(config, x, weights, "final_norm") @ output.T


def losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """−log probability of each label."""
    chosen = logits_BSV.gather(-1, labels_BS[..., None])[..., 0]
    return torch.logsumexp(logits_BSV, dim=-1) - chosen


def latent_head(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """MLA (arXiv 2405.04434, equations 9 to 19) and GLA (arXiv 2505.21487): heads read the latent of their group."""
    width, latents = config.head_width, config.num_latents or 1
    if config.query_rank:
        x = rms_norm(config, linear(x, weights, "query_latent"), weights, "query_latent_norm")
    q = split(linear(x, weights, "query"), config.num_heads)[head]
    latent = split(linear(y, weights, "latent"), latents)[head * latents // config.num_heads]
    latent = rms_norm(config, latent, weights, "latent_norm")
    of_head = {name: weight[2 * width * head : 2 * width * (head + 1)] for name, weight in weights.items()}
    k, v = split(linear(latent, of_head, "key_value"), 2)
    if config.rope_dim:
        q_shared, k_shared = q[:, width:], linear(y, weights, "shared_key")
        if config.position == "rope":
            q_shared, k_shared = (rope(z, config.rope_theta, sight.places) for z in (q_shared, k_shared))
        q, k = torch.cat([q[:, :width], q_shared], dim=1), torch.cat([k, k_shared], dim=1)
    return one_head(q, k, v, sight, torch.zeros_like(v[0]))


def tied_head(config: ModelConfig, x: Tensor, y: Tensor, weights: dict[str, Tensor], head: int, sight: Sight) -> Tensor:
    """GTA (arXiv 2505.21487): keys are half of the values, and half a key for all heads, which alone is rotated."""
    kv_heads, half = config.num_kv_heads or 0, config.head_width // 2
    q = split(linear(x, weights, "query"), config.num_heads)[head]
    v = split(linear(y, weights, "key_value"), kv_heads)[head * kv_heads // config.num_heads]
    q_shared, k_shared = q[:, half:], linear(y, weights, "shared_key")
    if config.position == "rope":
        q_shared, k_shared = (rope(z, config.rope_theta, sight.places) for z in (q_shared, k_shared))
    q, k = torch.cat([q[:, :half], q_shared], dim=1), torch.cat([v[:, :half], k_shared], dim=1)
    return one_head(q, k, v, sight, torch.zeros_like(v[0]))


OWN |= {"mla": latent_head, "gla": latent_head, "gta": tied_head}
