"""The configuration of a manyheads model for transformers. Exported folders hold a copy of this file."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# Kinds of attention, and the heads of keys and values that each caches: one, all, or as many as a field says.
CACHED_HEADS: dict[str, int | str] = {
    "mha": "num_attention_heads",
    "gqa": "num_kv_heads",
    "mqa": 1,
    "skv": "num_attention_heads",
    "el": "num_attention_heads",
    "sha": "num_seeds",
    "mhe_add": "num_seeds",
    "mhe_mul": "num_seeds",
    "diff": "num_kv_heads",
    "diff_v2": "num_kv_heads",
    "mla": 1,  # latents, and the key that heads share, are one vector
    "gla": 1,
    "gta": "num_kv_heads",
    "mfa": 1,
    "mhe_low_rank": "num_seeds",
    "tpa": "key_rank",
}
CHOICES = {
    "attention": tuple(CACHED_HEADS),
    "position": ("learned", "rope", "alibi", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "hidden_act": ("gelu", "silu"),
    "embedding_position": ("before", "after"),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
EMBEDDED = ("mhe_add", "mhe_mul", "mhe_low_rank")
LATENT = ("mla", "gla")
RANKS = {"mfa": ("query_rank",), "mhe_low_rank": ("query_rank",), "tpa": ("query_rank", "key_rank", "value_rank")}
DIFFERENTIAL = ("diff", "diff_v2")  # without num_kv_heads each head has its own keys and values


class ManyheadsConfig(PreTrainedConfig):
    """A decoder language model with one or several kinds of attention.

    `attention`: a kind, or a list of kinds that repeats over the layers: mha, gqa (`num_kv_heads` heads of keys and values),
    mqa, skv (keys are values), el (keys and values are the hidden state), sha (one head, read by all), mhe_add and mhe_mul (one
    shared head of each projection and embeddings that distinguish heads; arXiv 2310.07911). sha and mhe_* may have `num_seeds`
    shared heads instead of one, each for as many neighbouring heads. diff and diff_v2 subtract one softmax map of a head from
    another, on `num_kv_heads` heads of keys and values, or one for each head. mla
    (DeepSeek's) and gla cache latents, `latent_dim` wide together, gla `num_latents` of them, each for neighbouring heads, and
    `rope_dim` channels of a key that all heads share, which rope rotates; `query_rank` is that of queries. gta caches
    `num_kv_heads` values, half of which is half of a key. mfa is mqa with queries of `query_rank`; in mhe_low_rank such queries
    are added to those of mhe_add, whose embeddings `head_embeddings: false` leaves out. tpa caches `key_rank` and `value_rank`
    pairs of factors.

    All kinds: `qk_norm`: whether queries and keys are normed before their rotation. `output_gate`: gates of the heads' outputs,
    none, elementwise or one for each head. `attention_window`: a token attends to itself and so many tokens before it, less
    one; the cache keeps all tokens. `rope_fraction`: the share of a head's channels that rope rotates. Every
    `no_position_every`-th layer has neither rotation nor slopes, every `full_attention_every`-th no window. `attention_sinks`:
    whether heads have a logit in the denominator of their softmax. `logit_softcap`: c of c · tanh(score / c); null for none.
    `position`: learned, rope, alibi or none. `embedding_position`: whether mhe_* with rope embeds heads before or after the
    rotation; `key_embedding`: whether mhe_* has e^K. `norm`: layernorm or rmsnorm, with `norm_epsilon`. `bias`: whether linear
    layers and LayerNorm have one. `dropout`: after embeddings, attention and MLP. `attend_across_documents`: false shows tokens
    their own document only; documents end with the token `end_of_document`.

    `hidden_act` is gelu or, as in Llama, silu with a gate (SwiGLU). `num_key_value_heads` follows from the other fields: the
    most heads of keys that the cache of a layer keeps. `head_dim` is hidden_size / num_attention_heads if it is not given.
    `max_position_embeddings` is the size of the table of learned positions; other positions have no longest sequence.

    Raises ValueError for invalid values.
    """

    model_type = "manyheads"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    attention: str | list[str] = "mhe_add"
    position: str = "learned"
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    bias: bool = True
    num_kv_heads: int | None = None
    num_seeds: int = 1
    query_rank: int | None = None
    key_rank: int | None = None
    value_rank: int | None = None
    latent_dim: int | None = None
    num_latents: int | None = None
    rope_dim: int | None = None
    qk_norm: bool = False
    output_gate: str | None = None
    rope_fraction: float = 1.0
    no_position_every: int | None = None
    attention_window: int | None = None
    full_attention_every: int | None = None
    attention_sinks: bool = False
    logit_softcap: float | None = None
    embedding_position: str = "after"
    key_embedding: bool = True
    head_embeddings: bool = True
    dropout: float = 0.0
    attend_across_documents: bool = True
    end_of_document: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, known in CHOICES.items():
            for value in self.pattern if name == "attention" else [getattr(self, name)]:
                _require(value in known, f"{name} {value!r}: known are {', '.join(known)}")
        for name in SIZES:
            _require(_is_count(getattr(self, name)), f"{name} {getattr(self, name)!r}: must be a whole number above 0")
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size}) "
                "unless head_dim is given",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_numbers()
        self._check_heads()
        self._check_documents()
        super().__post_init__(**kwargs)

    @property
    def pattern(self) -> list[str]:
        """The kinds of attention that repeat over the layers."""
        return [self.attention] if isinstance(self.attention, str) else list(self.attention)

    def kind(self, layer: int) -> str:
        """The attention of a layer."""
        return self.pattern[layer % len(self.pattern)]

    def cached_heads(self, kind: str) -> int:
        """The heads of keys and values that a layer of this kind caches."""
        heads = CACHED_HEADS[kind]
        if kind in DIFFERENTIAL and self.num_kv_heads is None:
            return self.num_attention_heads
        return heads if isinstance(heads, int) else getattr(self, heads)

    def layer_position(self, layer: int) -> str:
        """How positions enter a layer."""
        every = self.no_position_every
        return "none" if every and (layer + 1) % every == 0 else self.position

    def layer_window(self, layer: int) -> int | None:
        """The tokens that a query of a layer sees at most; None for all."""
        every = self.full_attention_every
        return None if every and (layer + 1) % every == 0 else self.attention_window

    @property
    def capped_or_sunk(self) -> bool:
        """Whether scores have a soft-cap, or softmax a sink."""
        return self.attention_sinks or self.logit_softcap is not None

    def rotated_channels(self, width: int) -> int:
        """How many of `width` channels rope rotates."""
        return round(self.rope_fraction * width)

    @property
    def rotary_widths(self) -> set[int]:
        """How wide is what layers rotate."""
        assert self.head_dim is not None
        widths = {"diff": self.head_dim // 2, "gta": self.head_dim // 2}
        widths |= {kind: self.rope_dim for kind in LATENT if self.rope_dim is not None}
        return {widths.get(kind, self.head_dim) for kind in self.pattern}

    @property
    def has_embeddings(self) -> bool:
        """Whether heads have embeddings."""
        return any(kind in EMBEDDED for kind in self.pattern)

    @property
    def rotates_embeddings(self) -> bool:
        """Whether the embeddings of heads are rotated with the positions."""
        return self.has_embeddings and self.position == "rope" and self.embedding_position == "before"

    def _check_numbers(self) -> None:
        _require(0 <= self.dropout < 1, f"dropout {self.dropout}: must be in [0, 1)")
        _require(self.norm_epsilon > 0, f"norm_epsilon {self.norm_epsilon}: must be above 0")
        gate = self.output_gate
        _require(gate in (None, "elementwise", "head"), f"output_gate {gate!r}: known are null, elementwise, head")
        for name in ("no_position_every", "attention_window", "full_attention_every"):
            value = getattr(self, name)
            _require(value is None or _is_count(value), f"{name} {value!r}: must be null or a whole number above 0")
        cap = self.logit_softcap
        _require(cap is None or cap > 0, f"logit_softcap {cap}: must be null or above 0")
        _require(self.rope_theta > 0, f"rope_theta {self.rope_theta}: must be above 0")
        _require(self.initializer_range > 0, f"initializer_range {self.initializer_range}: must be above 0")

    def _check_heads(self) -> None:
        heads, width = self.num_attention_heads, self.head_dim
        _require(_is_count(width), f"head_dim {width!r}: must be a whole number above 0")
        assert width is not None
        for kind in self.pattern:
            kept, field = self.cached_heads(kind), CACHED_HEADS[kind]
            if kind == "tpa":
                continue
            _require(_is_count(kept), f"{field} {kept!r}: {kind} needs a divisor of num_attention_heads")
            _require(heads % kept == 0, f"{field} {kept}: must divide num_attention_heads ({heads})")
        self._check_ranks()
        most, given = max(self.cached_heads(kind) for kind in self.pattern), self.num_key_value_heads
        _require(given in (None, most), f"num_key_value_heads {given}: the cache of {self.attention} keeps {most}")
        self.num_key_value_heads = most
        _require(self.position != "rope" or width % 2 == 0, f"head_dim {width}: must be even with rope")
        halved = 4 if self.position == "rope" else 2
        for kind in {"diff", "gta"}.intersection(self.pattern):
            _require(width % halved == 0, f"head_dim {width}: {kind} needs a multiple of {halved}")
        self._check_latents()
        turned = self.rotated_channels(width)
        _require(
            self.position != "rope" or (turned > 0 and turned % 2 == 0),
            f"rope_fraction {self.rope_fraction}: must leave an even number of the {width} channels for rope",
        )
        _require(
            "el" not in self.pattern or heads * width == self.hidden_size,
            f"el splits the hidden state into heads: num_attention_heads * head_dim ({heads} * {width}) must be hidden_size "
            f"({self.hidden_size})",
        )
        _require(
            self.embedding_position == "after" or self.rotates_embeddings,
            f"embedding_position 'before': used only by {', '.join(EMBEDDED[:-1])} and {EMBEDDED[-1]} with rope",
        )

    def _check_ranks(self) -> None:
        """The fields of mfa, mhe_low_rank and tpa."""
        for kind, names in RANKS.items():
            for name in names if kind in self.pattern else ():
                rank = getattr(self, name)
                allowed = _is_count(rank) or (kind == "mhe_low_rank" and rank == 0)
                _require(allowed, f"{name} {rank!r}: {kind} needs a whole number above 0")
        for kind in {"mhe_add", "mhe_mul"}.intersection(self.pattern):
            _require(self.head_embeddings, f"head_embeddings false: {kind} has them; without them it is sha")

    def latents(self, layer: int) -> int:
        """The latents of keys and values of a layer, mla or gla."""
        return self.num_latents or 1 if self.kind(layer) == "gla" else 1

    def _check_latents(self) -> None:
        """The fields of mla and gla."""
        for kind in dict.fromkeys(kind for kind in self.pattern if kind in LATENT):
            width, rank, shared = self.latent_dim, self.query_rank, self.rope_dim
            _require(_is_count(width), f"latent_dim {width!r}: {kind} needs a whole number above 0")
            _require(rank is None or _is_count(rank), f"query_rank {rank!r}: must be null or a whole number above 0")
            _require(shared is None or _is_count(shared), f"rope_dim {shared!r}: must be null or a whole number above 0")
            _require(
                self.position != "rope" or (shared is not None and shared % 2 == 0),
                f"rope_dim {shared!r}: {kind} needs an even number with rope",
            )
        if "gla" in self.pattern:
            count = self.num_latents
            assert self.latent_dim is not None
            _require(_is_count(count), f"num_latents {count!r}: gla needs a whole number above 0")
            assert count is not None
            _require(
                self.num_attention_heads % count == 0 and self.latent_dim % count == 0,
                f"num_latents {count}: must divide num_attention_heads ({self.num_attention_heads}) and latent_dim "
                f"({self.latent_dim})",
            )

    def _check_documents(self) -> None:
        end = self.end_of_document
        if self.attend_across_documents:
            _require(end is None, f"end_of_document {end}: used only with attend_across_documents false")
        else:
            known = isinstance(end, int) and 0 <= end < self.vocab_size
            _require(known, f"end_of_document {end}: attend_across_documents false needs a token id below {self.vocab_size}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
