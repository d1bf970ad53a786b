"""What the schema cannot know about the `model` section: registered names, and the fields that each of them reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from configs.schema import DataConfig, Fault, ModelConfig, Section
from model.attention.faults import attention_faults, known_attention
from model.attention.registry import attention_variant
from model.positions.registry import position_faults
from model.registry import kind_faults, model_kind, model_kinds


def model_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """For `load_config`: all faults of a section that is valid by the schema."""
    model = sections.get("model")
    if not isinstance(model, ModelConfig):
        return []
    data = sections.get("data")
    if model.attend_across_documents is None and isinstance(data, DataConfig) and data.keeps_documents_apart:
        model = model.model_copy(update={"attend_across_documents": False})  # what null then means
    faults = [*kind_faults(model), *_causal_faults(model), *attention_faults(model), *position_faults(model)]
    return [Fault(f"model.{fault.key}", fault.value, fault.allowed) for fault in faults]


def _causal_faults(model: ModelConfig) -> Iterator[Fault]:
    """Variants that a causal kind of model cannot have."""
    if not known_attention(model) or model.kind not in model_kinds() or not model_kind(model.kind).causal:
        return
    for name in dict.fromkeys(model.pattern):
        if not attention_variant(name).causal:
            able = [kind for kind in model_kinds() if not model_kind(kind).causal]
            kinds = f"take model.kind {' or '.join(able)}, or another attention" if able else "take another attention"
            wanted = f"in {name} a token sees later ones, which a {model.kind} must not; {kinds}"
            yield Fault("attention", model.attention, wanted)
