"""What the schema cannot know about the `model` section: fields that only some attention variants or positions read."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.registry import attention_names, attention_variant
from model.attention.variant import Variant


def attention_faults(model: ModelConfig) -> Iterator[Fault]:
    """Faults of `attention` and its options; keys are relative to the section."""
    if model.attention not in attention_names():
        yield Fault("attention", model.attention, f"known: {', '.join(attention_names())}")
        return
    variant = attention_variant(model.attention)
    yield from _unread(model, variant)
    yield from variant.faults(model)


def _unread(model: ModelConfig, variant: Variant) -> Iterator[Fault]:
    """Fields and kernels that the variant does not use."""
    variants = {name: attention_variant(name) for name in attention_names()}
    optional = dict.fromkeys(field for other in variants.values() for field in other.options)
    for field in optional:
        value = getattr(model, field)
        if field not in variant.options and value != ModelConfig.model_fields[field].default:
            readers = [name for name, other in variants.items() if field in other.options]
            yield Fault(field, value, f"{only(readers, model.attention)}; set it to {ModelConfig.default(field)}")
    if model.attention_kernel not in variant.kernels:
        readers = [name for name, other in variants.items() if model.attention_kernel in other.kernels]
        known = f"{only(readers, model.attention)}; take {', '.join(variant.kernels)}"
        yield Fault("attention_kernel", model.attention_kernel, known)


def only(names: list[str], other: str) -> str:
    """The message for a field that only `names` use, given to the variant `other`."""
    return f"only {', '.join(names)} {'has' if len(names) == 1 else 'have'} it, not {other}"
