"""Our native Hugging Face format: the same parameters, with the code that runs them in the folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.schema import ModelConfig
from model.build import unsharded_shapes
from model.huggingface.configuration_manyheads import CHOICES, ManyheadsConfig
from model.huggingface.fold import Read
from model.huggingface.modeling_manyheads import ManyheadsForCausalLM, ManyheadsForSequenceClassification, ManyheadsModel
from model.huggingface.stock import Named, Shape

CODE = ("configuration", "attention", "differential", "latent", "low_rank", "modeling")
CODE_FILES = tuple(Path(__file__).with_name(f"{name}_manyheads.py") for name in CODE)
AUTO_MAP = {
    "AutoConfig": "configuration_manyheads.ManyheadsConfig",
    "AutoModel": "modeling_manyheads.ManyheadsModel",
    "AutoModelForCausalLM": "modeling_manyheads.ManyheadsForCausalLM",
    "AutoModelForSequenceClassification": "modeling_manyheads.ManyheadsForSequenceClassification",
}


def native_refusal(config: ModelConfig) -> str | None:
    """Why our own class cannot compute this model, and what to add; None if it can."""
    attentions = [("attention", name, "CACHED_HEADS") for name in config.pattern]
    for field, value, known in (*attentions, ("position", config.position, "CHOICES")):
        if value not in CHOICES[field]:
            return (
                f"our own class does not know model.{field}: {value}. Add it to {known} in "
                "model/huggingface/configuration_manyheads.py and what it computes to attention_manyheads.py; "
                "docs/adding_attention.md shows how"
            )
    return None


def native_config(config: ModelConfig, shape: Shape, **others: Any) -> ManyheadsConfig:
    """The configuration of a resolved model, with the vocabulary and the longest sequence of `shape`; `others` are passed on.

    The number of cached heads depends only on the attention; `shape` has that of a stock architecture.
    """
    of_transformers: dict[str, Any] = {"architectures": [ManyheadsForCausalLM.__name__], "auto_map": dict(AUTO_MAP)}
    return ManyheadsConfig(
        vocab_size=shape.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        num_seeds=config.num_seeds,
        query_rank=config.query_rank,
        key_rank=config.key_rank,
        value_rank=config.value_rank,
        latent_dim=config.latent_dim,
        num_latents=config.num_latents,
        rope_dim=config.rope_dim,
        qk_norm=config.qk_norm,
        output_gate=config.output_gate,
        rope_fraction=config.rope_fraction,
        no_position_every=config.no_position_every,
        attention_window=config.sliding_window,  # transformers' caches read `sliding_window`, and would drop tokens
        full_attention_every=config.full_attention_every,
        attention_sinks=config.attention_sinks,
        logit_softcap=config.logit_softcap,
        head_dim=config.head_width,
        intermediate_size=config.ffn_width,
        hidden_act="gelu" if config.activation == "gelu" else "silu",
        max_position_embeddings=config.max_position_embeddings or shape.length,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        rope_theta=config.rope_theta,
        attention=_attention(config),
        position=config.position,
        norm=config.norm,
        norm_epsilon=config.norm_epsilon,
        bias=config.bias,
        embedding_position=config.embedding_position,
        key_embedding=config.key_embedding,
        head_embeddings=config.head_embeddings,
        dropout=config.dropout,
        attend_across_documents=not config.separates_documents,
        end_of_document=config.end_of_document,
        **of_transformers,
        **others,
    )


def _attention(config: ModelConfig) -> str | list[str]:
    """The kinds of attention; mhe_* without embeddings is sha, but for queries of low rank."""
    alike = [name for name in config.pattern if name.startswith("mhe_") and (name != "mhe_low_rank" or not config.query_rank)]
    names = ["sha" if name in alike and not config.head_embeddings else name for name in config.pattern]
    return names[0] if len(set(names)) == 1 else names


def native_tensors(config: ModelConfig, read: Read, shape: Shape) -> Named:
    """Each tensor of ManyheadsForCausalLM and the function that makes it from our parameters by name, in their type.

    The token embedding and the output layer have the first `shape.vocab_size` rows.
    """
    for name in unsharded_shapes(config):
        native = "lm_head.weight" if name == "output.weight" else f"model.{name}"
        rows = shape.vocab_size if name in ("token_embedding.weight", "output.weight") else None
        yield native, functools.partial(_rows, read, name, rows)


def _rows(read: Read, name: str, rows: int | None) -> Tensor:
    return read(name)[:rows]


def register() -> None:
    """Register the format with transformers' Auto classes, so that its folders load without trust_remote_code."""
    AutoConfig.register(ManyheadsConfig.model_type, ManyheadsConfig, exist_ok=True)
    AutoModel.register(ManyheadsConfig, ManyheadsModel, exist_ok=True)
    AutoModelForCausalLM.register(ManyheadsConfig, ManyheadsForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ManyheadsConfig, ManyheadsForSequenceClassification, exist_ok=True)
