"""Kinds of models by name (`model.kind`): the only place that tells them apart.

Torch-free, so that configurations are checked without loading it; model/build.py builds models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from configs.schema import Fault, ModelConfig
from configs.targets import load_target


@dataclass(frozen=True)
class ModelKind:
    """One kind of model.

    `target` is its class as "module:Class", a subclass of model/row.py:RowModel. `generates`: it generates text token by token,
    so its class is a model/generation.py:Generative. `exports`: model/huggingface can export it. `causal`: no token attends to
    a later one.
    """

    target: str
    causal: bool
    generates: bool
    exports: bool


_KINDS = {"decoder": ModelKind("model.decoder:DecoderLM", causal=True, generates=True, exports=True)}


def model_kinds() -> list[str]:
    """All values of `model.kind`."""
    return list(_KINDS)


def model_kind(name: str) -> ModelKind:
    """The entry of `name`; KeyError if there is none."""
    return _KINDS[name]


def model_class(name: str) -> type[Any]:
    """The class of `name`, built as `Class(model_config, layers, recompute_activations)`."""
    kind: type[Any] = load_target(_KINDS[name].target)
    return kind


def ability_fault(name: str, ability: Literal["generates", "exports"]) -> Fault | None:
    """The fault of a kind of model without this ability; None for kinds that have it."""
    if getattr(_KINDS[name], ability):
        return None
    able = ", ".join(other for other, kind in _KINDS.items() if getattr(kind, ability))
    missing = {"generates": "cannot generate text", "exports": "cannot be exported"}[ability]
    return Fault("model.kind", name, f"{missing}; only {able} can")


def kind_faults(model: ModelConfig) -> Iterator[Fault]:
    """What the schema cannot know about `kind`; keys relative to the section."""
    if model.kind not in _KINDS:
        yield Fault("kind", model.kind, f"known: {', '.join(_KINDS)}")
