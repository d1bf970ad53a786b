"""Small models of the training code, and the same models in the native Hugging Face format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.faults import model_faults
from model.huggingface.modeling_manyheads import (
    ManyheadsForCausalLM,
)
from model.huggingface.native import native_config, native_tensors
from model.huggingface.stock import Shape
from tests.needs import causal_names, needs

VOCABULARY, ROWS, LENGTH, END = 37, 40, 24, 5  # ROWS pads the vocabulary, as training does
SHAPE = Shape(VOCABULARY, LENGTH, 1, 1)
OTHERS = ("learned", "alibi", "none")  # take turns
BEFORE: dict[str, Any] = {"position": "rope", "embedding_position": "before"}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
APART: dict[str, Any] = {"attend_across_documents": False, "end_of_document": END}
SWITCHED: dict[str, Any] = {  # all switches that every variant has
    "position": "rope",
    "output_gate": "head",
    "no_position_every": 2,
    "sliding_window": 5,
    "full_attention_every": 3,
    "attention_sinks": True,
    "logit_softcap": 2.0,
    "num_layers": 3,
}
CASES: list[dict[str, Any]] = [
    *({"attention": attention, "position": "rope"} for attention in causal_names()),
    *({"attention": attention, "position": OTHERS[number % 3]} for number, attention in enumerate(causal_names())),
    *({"attention": attention, **SWITCHED} for attention in causal_names()),
    *({"attention": attention, **BEFORE} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, **BEFORE, **LLAMA, "key_embedding": False} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, **BEFORE, **LLAMA, **APART} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, "position": "rope", "key_embedding": False} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, **BEFORE, "num_seeds": 2} for attention in ("mhe_add", "mhe_mul")),
    *({"attention": attention, "position": "alibi", "num_seeds": 3} for attention in ("sha", "mhe_add", "mhe_mul")),
    {"attention": "mhe_mul", "num_seeds": 2, "head_embeddings": False},
    {"attention": "mhe_low_rank", "position": "rope", "num_seeds": 2, "head_embeddings": False},
    {"attention": ("mhe_low_rank", "mhe_add"), "position": "alibi", "query_rank": 0, "head_embeddings": False},
    {"attention": ("mhe_add", "gqa"), "position": "rope", "num_seeds": 2, "qk_norm": True},
    {"attention": ("skv", "mhe_mul"), "num_layers": 3, "head_embeddings": False},
    {"attention": "mhe_add", "bias": False, "key_embedding": False},
    {"attention": "mhe_mul", "tie_embeddings": False, "norm": "rmsnorm"},
    {"attention": "mhe_mul", "position": "alibi", **APART},
    {"attention": "mha", "activation": "swiglu", **APART},
    {"attention": "gqa", "position": "rope", **LLAMA},
    {"attention": "mha", "position": "rope", "qk_norm": True, "output_gate": "elementwise"},
    {"attention": "mhe_add", **BEFORE, **LLAMA, "qk_norm": True, "output_gate": "head"},
    {"attention": "mhe_mul", **BEFORE, "rope_fraction": 0.5, "no_position_every": 2},
    {"attention": "sha", "position": "alibi", "no_position_every": 2, "sliding_window": 3},
    {"attention": "mqa", "position": "rope", "rope_fraction": 0.5, "sliding_window": 4, "full_attention_every": 2},
    {"attention": "sha", "position": "rope", "attention_sinks": True},
    {"attention": "mhe_add", **BEFORE, "attention_sinks": True, "logit_softcap": 2.0},
    {"attention": "mhe_mul", "position": "alibi", "attention_sinks": True, "num_seeds": 2},
    {"attention": "gqa", "position": "rope", "logit_softcap": 1.5, "sliding_window": 4},
]
SPREAD = {"token_embedding": 0.1, "position_embedding": 0.1, "final_norm": 0.1}
FEW: list[dict[str, Any]] = [
    {"attention": "mhe_add"},
    {"attention": "mhe_mul", "position": "alibi", **APART},
    {"attention": "mhe_add", **BEFORE},
    {"attention": "mhe_mul", **BEFORE, **LLAMA},
    {"attention": "mhe_mul", "position": "rope"},
    {"attention": "mhe_add", "position": "none", **APART},
    {"attention": "skv", "position": "rope"},
    {"attention": "sha", "position": "alibi"},
    {"attention": "gqa", "position": "rope", **APART},
    {"attention": "mla", "position": "rope"},
    {"attention": "gla", "position": "rope", "query_rank": None, **APART},
    {"attention": "gta", "position": "rope", "bias": False},
    {"attention": "mfa", "position": "rope", "qk_norm": True},
    {"attention": "mhe_low_rank", **BEFORE, "num_seeds": 2, "qk_norm": True},
    {"attention": "tpa", "position": "rope", **APART},
    {"attention": ("mhe_mul", "gqa"), **BEFORE, "qk_norm": True},
    {"attention": "mhe_add", "position": "alibi", "num_seeds": 3},
    {"attention": "diff", "position": "rope", "num_kv_heads": 2, "qk_norm": True},
    {"attention": "diff_v2", "position": "alibi", "num_kv_heads": 3, **APART},
    {"attention": "mhe_add", **BEFORE, "no_position_every": 2, "sliding_window": 4, "output_gate": "head", **APART},
    {"attention": "mhe_add", "position": "rope", "attention_sinks": True, "logit_softcap": 2.0},
    {"attention": "mha", "position": "alibi", "sliding_window": 3, "full_attention_every": 2, "qk_norm": True},
    {"attention": ("mla", "diff", "tpa"), **SWITCHED},
    {"attention": ("gta", "mhe_low_rank", "diff_v2"), **SWITCHED, "position": "alibi"},
]


def named(case: dict[str, Any]) -> str:
    return "-".join(f"{value}" if isinstance(value, str) else f"{key}={value}" for key, value in case.items())


each = pytest.mark.parametrize("case", CASES, ids=named)
some = pytest.mark.parametrize("case", FEW, ids=named)


def model_config(case: dict[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "head_dim": 4, "vocab_size": ROWS}
    fields |= needs(case["attention"])
    fields |= {"max_position_embeddings": LENGTH} if case.get("position", "learned") == "learned" else {}
    config = ModelConfig(**fields | case)
    assert not model_faults({"model": config})
    return config


def pair(case: dict[str, Any], dtype: torch.dtype = torch.float64, kernel: str = "sdpa") -> tuple[DecoderLM, Any]:
    """A model of ours with large random parameters, and the same in the native format."""
    config = model_config(case)
    ours = DecoderLM(config).to(dtype).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # Small embeddings: otherwise a token most likely repeats itself, whatever came before.
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else noise * SPREAD.get(name.split(".")[-2], 0.5))
    return ours, native(ours, kernel)


def native(ours: DecoderLM, kernel: str = "sdpa") -> Any:
    settings = native_config(ours.config, SHAPE)
    settings._attn_implementation = kernel
    theirs: Any = ManyheadsForCausalLM(settings)
    theirs = theirs.to(next(ours.parameters()).dtype).eval()
    parameters = ours.state_dict()
    tensors = {name: make() for name, make in native_tensors(ours.config, parameters.__getitem__, SHAPE)}
    found = theirs.load_state_dict(tensors, strict=False)
    tied = ["lm_head.weight"] if ours.config.tie_embeddings else []
    assert (found.missing_keys, found.unexpected_keys) == (tied, [])
    theirs.tie_weights()
    return theirs


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids; each row has an end of a document in it."""
    drawn = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    drawn[torch.arange(rows), torch.arange(rows) % (length - 2) + 1] = END
    return drawn


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (S,) side by side with padding on the left, which is written as `END`, and the mask."""
    length = max(len(prompt) for prompt in prompts)
    rows = [F.pad(prompt, (length - len(prompt), 0), value=END) for prompt in prompts]
    masks = [F.pad(torch.ones_like(prompt), (length - len(prompt), 0)) for prompt in prompts]
    return torch.stack(rows), torch.stack(masks)


def generated(model: Any, ids: Tensor, count: int = 8, **options: Any) -> Any:
    """transformers' output for the `count` likeliest ids after the prompt."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "return_dict_in_generate": True} | options
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, pad_token_id=END, **options)


def greedy(model: Any, ids: Tensor, count: int = 8, **options: Any) -> Tensor:
    """The `count` likeliest ids after the prompt."""
    return generated(model, ids, count, **options).sequences[:, ids.shape[1] :]
