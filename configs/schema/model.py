"""Section `model`: the architecture."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from configs.schema.base import Fault, Section

LONGEST_PATTERN = 2**14  # layers
_REPEATED = re.compile(r"(\S+)(?:\s+x|\s*[×*])\s*(\d{1,5})")


def attention_pattern(value: Any) -> Any:
    """The variants of a pattern's layers, as a tuple: ["mhe_add x 2", "mha"] → ("mhe_add", "mhe_add", "mha")."""
    if not isinstance(value, list | tuple):
        return value
    names: list[str] = []
    for entry in value:
        if not isinstance(entry, str):
            raise PydanticCustomError("pattern", "a list holds names of variants, such as [mhe_add x 3, mha]")
        found = _REPEATED.fullmatch(entry.strip())
        times = int(found[2]) if found else 1
        if times < 1:
            raise PydanticCustomError("pattern", "a variant of a list must be repeated at least once")
        names += [found[1] if found else entry.strip()] * times
    if not 0 < len(names) <= LONGEST_PATTERN:
        raise PydanticCustomError("pattern", "a list must have from 1 to 16384 layers")
    period = next(n for n in range(1, len(names) + 1) if names[n:] == names[: len(names) - n])
    if len(names) % period == 0:  # one way to write it
        names = names[:period]
    return names[0] if period == 1 else tuple(names)


AttentionPattern = Annotated[str | tuple[str, ...], BeforeValidator(attention_pattern)]


class ModelConfig(Section):
    kind: str = Field("decoder", description="Kind of model; decoder: a causal language model")
    attention: AttentionPattern = Field(
        "mhe_add",
        description="Attention variant (docs/attention.md), or a list that repeats over the layers: [mhe_add x 3, mha]",
    )
    hidden_size: int = Field(ge=1, le=2**18, description="Width of the residual stream")
    num_layers: int = Field(ge=1, le=2**14, description="Number of transformer blocks")
    num_heads: int = Field(ge=1, le=2**16, description="Query heads of one attention layer")
    head_dim: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="Width of one head; null: hidden_size / num_heads. num_heads * head_dim may differ from hidden_size",
    )
    num_kv_heads: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="gqa, gta, diff, diff_v2: heads of keys and values; must divide num_heads. gqa and gta need it; diff, "
        "diff_v2: null is one for each head",
    )
    num_seeds: int = Field(
        1,
        ge=1,
        le=2**16,
        description="sha, mhe_*: shared projections of Q, K and V, each for num_heads / num_seeds neighbouring heads; 1 is the "
        "paper's",
    )
    head_embeddings: bool = Field(
        True,
        description="mhe_*: heads have embeddings; false, for comparison: the heads of a seed are one, which all their columns "
        "of the output projection read",
    )
    embedding_position: Literal["before", "after"] = Field(
        "after", description="mhe_* with rope: head embeddings enter before or after the rotation (docs/attention.md)"
    )
    key_embedding: bool = Field(
        True,
        description="mhe_*: learn e^K; false leaves it out. In mhe_add its gradient is exactly zero and outputs are the same "
        "without it, unless embedding_position is before",
    )
    head_embedding_std: float | None = Field(
        None, ge=0, le=100, description="mhe_*: standard deviation of initial head embeddings; null: init_std"
    )
    query_rank: int | None = Field(
        None,
        ge=0,
        le=2**20,
        description="mfa, mhe_low_rank, tpa, which need it, mla, gla: rank of the queries; mhe_low_rank: 0 is mhe_add; mla, "
        "gla: null projects them directly",
    )
    key_rank: int | None = Field(None, ge=1, le=2**16, description="tpa, which needs it: rank of the keys")
    value_rank: int | None = Field(None, ge=1, le=2**16, description="tpa, which needs it: rank of the values")
    latent_dim: int | None = Field(
        None, ge=1, le=2**20, description="mla, gla, which need it: width of the latents of K and V, together"
    )
    num_latents: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="gla, which needs it: latents, each for neighbouring heads; must divide num_heads and latent_dim",
    )
    rope_dim: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="mla, gla, which need it with rope: channels of the one key for all heads, which alone is rotated, and of "
        "each query for it",
    )
    linformer_length: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="linformer: how many keys and values it projects a sequence to; at most linformer_tokens",
    )
    linformer_tokens: int | None = Field(
        None, ge=1, le=2**24, description="linformer: longest sequence, columns of its projections; null: data.sequence_length"
    )
    qk_norm: bool = Field(
        False, description="RMSNorm of each head's queries and keys before the rotation; mhe_*: of the shared ones"
    )
    output_gate: Literal["elementwise", "head"] | None = Field(
        None,
        description="Outputs of heads times sigmoid(x W_g), with x the normalised hidden state: one gate for each channel of a "
        "head, or one for each head; null: none (docs/attention.md#switches)",
    )
    sliding_window: int | None = Field(
        None, ge=1, le=2**24, description="A token attends to itself and the sliding_window - 1 tokens before it; null: to all"
    )
    full_attention_every: int | None = Field(
        None, ge=2, le=2**14, description="With sliding_window: layers k, 2k, … attend to all tokens before"
    )
    attention_sinks: bool = Field(
        False,
        description="A learned logit of each head in the denominator of its softmax, so that its weights sum to less than 1",
    )
    logit_softcap: float | None = Field(
        None, gt=0, le=1e4, description="Scores s become c * tanh(s / c) before mask and slopes; null: unchanged"
    )
    attention_kernel: Literal["auto", "math", "sdpa", "shared_scores"] = Field(
        "auto",
        description="Kernel; all agree up to rounding: math evaluates the formula, sdpa is torch's fused attention, "
        "shared_scores computes one softmax matrix for all heads of mhe_add (docs/attention.md)",
    )
    attend_across_documents: bool | None = Field(
        None,
        description="Tokens attend to other documents of the same sample, and positions count from its first token; false: a "
        "document is computed as if alone, in attention and positions; null: true with data.packing concatenate, else false",
    )
    end_of_document: int | None = Field(
        None, ge=0, lt=2**24, description="Token id that ends a document; null: the tokenizer's, if documents are kept apart"
    )
    ffn_hidden_size: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="Inner width of the MLP; null: 4 * hidden_size (gelu), 8/3 * hidden_size rounded up to 64 (swiglu)",
    )
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="MLP activation")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before attention, MLP and the output")
    norm_epsilon: float = Field(1e-5, ge=1e-15, le=1, description="Added to the variance by the norm")
    position: Literal["learned", "rope", "alibi", "none"] = Field("learned", description="How positions enter the model")
    max_position_embeddings: int | None = Field(
        None, ge=1, le=2**24, description="Longest sequence of learned positions; null: data.sequence_length"
    )
    rope_theta: float = Field(10000.0, ge=1, le=1e12, description="Base of rotary frequencies; position rope only")
    rope_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of a head's channels that rope rotates, an even number of them; position rope only"
    )
    no_position_every: int | None = Field(
        None, ge=2, le=2**14, description="Layers k, 2k, … have neither rotation nor slopes; positions rope and alibi only"
    )
    bias: bool = Field(True, description="Biases on linear layers and LayerNorm")
    tie_embeddings: bool = Field(True, description="Output projection shares the token embedding's weight")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout after embeddings, attention output and MLP")
    init_std: float = Field(
        0.02,
        ge=1e-9,
        le=100,
        description="Standard deviation of initial weights; divided by sqrt(2 * num_layers) in projections into the residual "
        "stream",
    )
    attention_output_init_scale: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Initial weights of attention's output projections as a multiple of what they are otherwise; many alike "
        "heads need less (docs/study.md)",
    )
    vocab_size: int | None = Field(
        None, ge=1, le=2**24, description="Rows of the token embedding; null: the tokenizer's size rounded up to vocab_multiple"
    )
    vocab_multiple: int = Field(
        64, ge=1, le=2**20, description="Vocabulary is padded to a multiple of this when vocab_size is null"
    )

    @property
    def pattern(self) -> tuple[str, ...]:
        """The attention variants that repeat over the layers."""
        return (self.attention,) if isinstance(self.attention, str) else self.attention

    @property
    def attention_words(self) -> str:
        """The attention of the layers, as text: mhe_add × 3, mha."""
        runs = [(name, len(list(run))) for name, run in itertools.groupby(self.pattern)]
        return ", ".join(name if count == 1 else f"{name} × {count}" for name, count in runs)

    @property
    def head_width(self) -> int:
        """head_dim, or its default."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def ffn_width(self) -> int:
        """ffn_hidden_size, or its default."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size if self.activation == "gelu" else 64 * math.ceil(8 * self.hidden_size / 3 / 64)

    @property
    def separates_documents(self) -> bool:
        """Whether the documents of a sequence are kept apart."""
        return self.attend_across_documents is False

    def faults(self) -> Iterator[Fault]:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            yield Fault("num_heads", self.num_heads, f"must divide hidden_size ({self.hidden_size}) unless head_dim is given")
        if len(self.pattern) > self.num_layers:
            yield Fault(
                "attention", self.attention, f"a list of {len(self.pattern)} layers, but num_layers is {self.num_layers}"
            )
        for name in ("no_position_every", "full_attention_every"):
            if (every := getattr(self, name)) is not None and every > self.num_layers:
                yield Fault(name, every, f"at most num_layers ({self.num_layers}), else no layer is one; or null")
        if self.full_attention_every is not None and self.sliding_window is None:
            yield Fault("full_attention_every", self.full_attention_every, "used only with sliding_window; set it to null")
        if self.end_of_document is not None and self.vocab_size is not None and self.end_of_document >= self.vocab_size:
            yield Fault("end_of_document", self.end_of_document, f"must be below vocab_size ({self.vocab_size})")
