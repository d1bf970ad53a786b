"""Arguments that several benchmarks share: lists separated by commas."""

from __future__ import annotations

import re

from pydantic_core import PydanticCustomError

from configs.errors import UserError
from configs.schema import ModelConfig
from configs.schema.model import attention_pattern
from configs.yaml_text import parse
from model.attention.registry import attention_names, attention_variant


def numbers(text: str, name: str) -> list[int]:
    """A comma list of positive whole numbers."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise UserError(f"--{name} {text}: positive whole numbers, separated by commas")
    return [int(value) for value in values]


def names(text: str, name: str, known: tuple[str, ...]) -> list[str]:
    values = list(known) if text == "all" else text.split(",")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"--{name} {','.join(unknown)}: known: {', '.join(known)}, all")
    return values


VARIANTS_HELP = (
    "of model.attention, with fields of their own (mhe_add:num_seeds=4), patterns of layers ([mhe_add x 3, mha]), or all"
)


def variants_of(text: str) -> list[str]:
    """A comma list of attention variants or patterns of layers, with fields of their own or without; `all`: every variant."""
    known = [name for name in attention_names() if attention_variant(name).causal]  # benchmarks train decoders
    given = [value.strip() for value in re.split(r",(?![^\[]*\])", text)]  # at commas outside brackets
    values = list(dict.fromkeys(name for value in given for name in (known if value == "all" else [value])))
    unknown = [value for value in values if not set(layers_of(value)) <= set(known)]
    if unknown:
        raise UserError(f"--variants {','.join(unknown)}: known: {', '.join(known)}, all")
    return values


def layers_of(variant: str) -> tuple[str, ...]:
    """The names that repeat over the layers: [mhe_add x 2, mha] → mhe_add, mhe_add, mha."""
    name, _ = variant_fields(variant)
    if not re.fullmatch(r"\[.*\]", name):
        return (name,)
    try:
        return (found,) if isinstance(found := attention_pattern(name[1:-1].split(",")), str) else found
    except PydanticCustomError as error:
        raise UserError(f"--variants {variant}: {error.message()}") from error


def variant_fields(variant: str) -> tuple[str, dict[str, object]]:
    """mla:latent_dim=64:rope_dim=8 → mla and the fields of the `model` section; UserError for other forms."""
    name, *pairs = variant.split(":")
    fields: dict[str, object] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals or field not in ModelConfig.model_fields:
            raise UserError(f"--variants {variant}: after the name come fields of the model, name:field=value:field=value")
        fields[field] = parse(value)
    return name, fields
