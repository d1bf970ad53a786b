"""What the schema cannot know about the `model` section: fields that only some attention variants or positions read."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from configs.schema.base import as_yaml
from model.attention.registry import attention_names, attention_variant, layer_kinds, variant_of

UNSHARED = {  # switches with which one softmax matrix does not serve all heads
    "sliding_window": "shared scores have no window",
    "attention_sinks": "sinks give every head a denominator of its own",
    "logit_softcap": "a capped score is no sum, of which heads could share a part",
}


def attention_faults(model: ModelConfig) -> Iterator[Fault]:
    """Faults of `attention` and its options; keys are relative to the section."""
    if not known_attention(model):
        unknown = next(name for name in model.pattern if name not in attention_names())
        hint = "a pattern is a list, [mhe_add x 3, mha]; " if "," in unknown or " " in unknown else ""
        # The command line shows the whole list as it was given.
        named = f"{unknown} is not known; " if len(model.pattern) > 1 else ""
        yield Fault("attention", unknown, f"{named}{hint}known: {', '.join(attention_names())}")
        return
    faults = [*_unread(model)]
    for layer in layer_kinds(model):
        faults += [*_refused(layer), *_without_shared_scores(layer), *variant_of(layer).faults(layer)]
    yield from dict.fromkeys(faults)


def known_attention(model: ModelConfig) -> bool:
    """Whether all variants of the model exist."""
    return set(model.pattern) <= set(attention_names())


def _unread(model: ModelConfig) -> Iterator[Fault]:
    """Fields and kernels that none of the model's variants uses."""
    variants = {name: attention_variant(name) for name in attention_names()}
    own, names = [variants[name] for name in dict.fromkeys(model.pattern)], " and ".join(dict.fromkeys(model.pattern))
    optional = dict.fromkeys(field for other in variants.values() for field in other.options)
    for field in optional:
        if model.changed(field) and not any(field in variant.options for variant in own):
            readers = [name for name, other in variants.items() if field in other.options]
            yield Fault(field, getattr(model, field), f"{only(readers, names)}; set it to {ModelConfig.default(field)}")
    if not any(model.attention_kernel in variant.kernels for variant in own):
        readers = [name for name, other in variants.items() if model.attention_kernel in other.kernels]
        known = f"{only(readers, names)}; take {', '.join(own[0].kernels)}"
        yield Fault("attention_kernel", model.attention_kernel, known)


def _refused(layer: ModelConfig) -> Iterator[Fault]:
    """Switches that the variant of a layer cannot have."""
    for field, why in variant_of(layer).refuses.items():
        if layer.changed(field):
            yield Fault(field, getattr(layer, field), f"{layer.attention}: {why}; set it to {ModelConfig.default(field)}")


def may_share_scores(layer: ModelConfig) -> bool:
    """Whether heads of the layer share their scores by the kernel `shared_scores`."""
    if "shared_scores" not in variant_of(layer).kernels:
        return False
    told = layer.model_copy(update={"attention_kernel": "shared_scores"})
    faults = [*variant_of(told).faults(told), *_without_shared_scores(told)]
    return not any(fault.key == "attention_kernel" for fault in faults)


def _without_shared_scores(layer: ModelConfig) -> Iterator[Fault]:
    """Switches with which heads do not share their scores, for a layer that is told to share them."""
    if layer.attention_kernel != "shared_scores" or "shared_scores" not in variant_of(layer).kernels:
        return
    for field, why in UNSHARED.items():
        if layer.changed(field):
            found = f"{field}: {as_yaml(getattr(layer, field))}"
            yield Fault("attention_kernel", "shared_scores", f"{why} ({found}); take auto, math or sdpa")


def only(names: list[str], other: str) -> str:
    """The message for a field that only `names` use, given to the variant `other`."""
    return f"only {', '.join(names)} {'has' if len(names) == 1 else 'have'} it, not {other}"
