"""The decoder straight from the papers' formulas: float64, loops over heads, explicit softmax. Shares nothing with `model`.

Weights come as a dictionary of parameter names, so that gradients of both sides can be compared name by name.
"""

from __future__ import annotations

import math

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


def rope(x: Tensor, theta: float) -> Tensor:
    """Channels c and c + D/2 of row t as a complex number, turned by the angle t · theta^(-2c/D)."""
    length, width = x.shape
    half = width // 2
    angles = [[t * theta ** (-2 * c / width) for c in range(half)] for t in range(length)]
    turn = torch.polar(torch.ones(length, half, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=1)


def one_head(q: Tensor, k: Tensor, v: Tensor, slope: float) -> Tensor:
    """Causal softmax attention of one head of one sequence."""
    length, width = q.shape
    rows = []
    for t in range(length):
        scores = k[: t + 1] @ q[t] / math.sqrt(width)
        scores = scores - slope * (t - torch.arange(t + 1, dtype=torch.float64))
        weights = torch.exp(scores - scores.max())
        rows.append((weights / weights.sum()) @ v[: t + 1])
    return torch.stack(rows)


def head_projections(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q_i, K_i, V_i before embeddings and rotation."""
    d = config.head_width
    if config.attention.startswith("mhe"):
        qkv = linear(x, weights, "qkv")
        return qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
    kv_heads = {"mha": config.num_heads, "mqa": 1, "gqa": config.num_kv_heads}[config.attention]
    assert kv_heads is not None
    group = head // (config.num_heads // kv_heads)
    query = linear(x, weights, "query")[:, head * d : (head + 1) * d]
    key_value = linear(x, weights, "key_value")[:, group * 2 * d : (group + 1) * 2 * d]
    return query, key_value[:, :d], key_value[:, d:]


def embed_head(config: ModelConfig, x: Tensor, weights: dict[str, Tensor], name: str, head: int) -> Tensor:
    """Equations of MHE-ADD and MHE-MUL (arXiv 2310.07911, section 3)."""
    if config.attention == "mhe_add":
        return x + weights[name][head]
    if config.attention == "mhe_mul":
        return x * (weights[name][head] + 1)
    return x


def attention(config: ModelConfig, batch: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """One attention layer; `weights` by the names inside the layer."""
    sequences = []
    for x in batch:
        heads = []
        for head in range(config.num_heads):
            q, k, v = head_projections(config, x, weights, head)
            if config.position == "rope" and config.embedding_position == "after":
                q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
            q = embed_head(config, q, weights, "query_embedding", head)
            k = embed_head(config, k, weights, "key_embedding", head)
            v = embed_head(config, v, weights, "value_embedding", head)
            if config.position == "rope" and config.embedding_position == "before":
                q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
            slope = ALIBI_SLOPES[config.num_heads][head] if config.position == "alibi" else 0.0
            heads.append(one_head(q, k, v, slope))
        sequences.append(linear(torch.cat(heads, dim=1), weights, "out"))
    return torch.stack(sequences)


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


def logits(config: ModelConfig, tokens_BS: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The whole model without dropout."""
    x = weights["token_embedding.weight"][tokens_BS]
    if config.position == "learned":
        x = x + weights["position_embedding.weight"][: tokens_BS.shape[1]]
    for number in range(config.num_layers):
        block = below(weights, f"blocks.{number}.")
        x = x + attention(config, norm(config, x, block, "attention_norm"), below(block, "attention."))
        x = x + mlp(config, norm(config, x, block, "mlp_norm"), below(block, "mlp."))
    output = weights["token_embedding.weight" if config.tie_embeddings else "output.weight"]
    return norm(config, x, weights, "final_norm") @ output.T


def losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """−log probability of each label."""
    chosen = logits_BSV.gather(-1, labels_BS[..., None])[..., 0]
    return torch.logsumexp(logits_BSV, dim=-1) - chosen
