"""Arguments that several benchmarks share: lists separated by commas."""

from __future__ import annotations

from configs.errors import UserError
from configs.schema import ModelConfig
from configs.yaml_text import parse
from model.attention.registry import attention_names


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


def variants_of(text: str) -> list[str]:
    """A comma list of attention variants, each with fields of its own or without: mha,mhe_add:num_seeds=4. Or `all`."""
    known = attention_names()
    values = known if text == "all" else text.split(",")
    unknown = [value for value in values if variant_fields(value)[0] not in known]
    if unknown:
        raise UserError(f"--variants {','.join(unknown)}: known: {', '.join(known)}, all")
    return values


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
