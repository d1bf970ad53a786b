"""Attention variants side by side: a run's configuration with another variant, and with the fields that this one needs.

A contender is written `mla` or `mha:num_heads=8`: a variant, and fields of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.load import Check, load_config
from configs.schema import Config, ModelConfig
from model.attention.registry import attention_names, attention_variant
from model.attention.usual import needed


def with_contender(path: str, overrides: Sequence[str], name: str, world_size: int = 1) -> list[str]:
    """The overrides, and those that make a contender of a configuration."""
    attention, *fields = name.split(":")
    own = [*overrides, f"--model.attention={attention}", *(f"--model.{field}" for field in fields)]
    model = load_config(path, own, world_size=world_size).model
    return [*own, *(f"--model.{field}={value}" for field, value in needed(model).items())]


def contender(path: str, overrides: Sequence[str], name: str, checks: Sequence[Check], world_size: int) -> Config:
    """The configuration with a contender's model; what only the file's own variant reads has its default."""
    model = load_config(path, overrides, world_size=world_size).model
    reset = [*overrides, *_unread(model, name.partition(":")[0])]
    return load_config(path, with_contender(path, reset, name, world_size), checks, world_size)


def _unread(model: ModelConfig, name: str) -> Iterator[str]:
    """Overrides that take back fields of variants that this one does not read."""
    if name not in attention_names():
        return  # the checks say so
    options = {option for other in attention_names() for option in attention_variant(other).options}
    for field in sorted(options - set(attention_variant(name).options)):
        if model.changed(field):
            yield f"--model.{field}={ModelConfig.default(field).strip(chr(39))}"
    if model.attention_kernel not in attention_variant(name).kernels:
        yield f"--model.attention_kernel={ModelConfig.default('attention_kernel').strip(chr(39))}"
