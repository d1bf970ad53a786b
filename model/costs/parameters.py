"""Parameter counts of a resolved model configuration."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.attention.registry import layer_kinds, projections_of, replicated_vectors, variant_of


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, which sum to the full model; `embeddings`: tokens and positions; `output`: 0 when tied."""
    hidden, layers = config.hidden_size, config.num_layers
    norm = hidden * norm_vectors(config)
    return {
        "embeddings": hidden * (vocabulary(config) + (config.max_position_embeddings or 0)),
        "attention": sum(count * attention_parameters(layer) for layer, count in layer_kinds(config).items()),
        "mlp": layers * _mlp(config),
        "norms": (2 * layers + 1) * norm,
        "output": 0 if config.tie_embeddings else hidden * vocabulary(config),
    }


def attention_parameters(layer: ModelConfig) -> int:
    """One attention layer with its output projection."""
    variant, hidden, bias = variant_of(layer), layer.hidden_size, int(layer.bias)
    projections = sum(one.values(hidden, layer.bias) for one in projections_of(layer).values())
    output = layer.num_heads * layer.head_width * hidden + bias * hidden
    of_heads = variant.embeddings(layer) + layer.num_heads * layer.attention_sinks
    return projections + of_heads + sum(replicated_vectors(layer)) + output


def _mlp(config: ModelConfig) -> int:
    inner = (mlp_matrices(config) - 1) * config.ffn_width
    weights = config.hidden_size * config.ffn_width * mlp_matrices(config)
    return weights + (inner + config.hidden_size if config.bias else 0)


def mlp_matrices(config: ModelConfig) -> int:
    """Weight matrices of an MLP: swiglu has a gate."""
    return 3 if config.activation == "swiglu" else 2


def norm_vectors(config: ModelConfig) -> int:
    """Parameter vectors of a norm, each as wide as the hidden state."""
    return 2 if config.norm == "layernorm" and config.bias else 1


def vocabulary(config: ModelConfig) -> int:
    """vocab_size. Raises ValueError if the configuration is not resolved."""
    if config.vocab_size is None:
        raise ValueError("the configuration is not resolved: vocab_size is null")
    return config.vocab_size
