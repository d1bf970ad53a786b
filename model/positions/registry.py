"""Positions by name: the only place that tells them apart. Torch-free, so that configurations are checked without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from configs.schema import Fault, ModelConfig
from configs.targets import load_target

Enters = Literal["embeddings", "rotation", "scores", "nowhere"]


@dataclass(frozen=True)
class PositionKind:
    """How positions enter a model, and the configuration fields that this needs.

    `enters`: a learned vector is added to the token's embedding; queries and keys are rotated; scores get a bias; or not at
    all. `target`, as "module:function", computes what attention needs: for a rotation `(config, width, length, dtype,
    device)` → cos and sin, (length, width/2) each; for scores `(num_heads)` → the slope of each head.

    `options` names the ModelConfig fields that only this kind reads; other kinds must leave them at their defaults. `faults`
    yields faults of its own fields. `prunable`: whether a head keeps its meaning when others are pruned.
    """

    enters: Enters
    target: str | None = None
    options: tuple[str, ...] = ()
    faults: Callable[[ModelConfig], Iterable[Fault]] = lambda config: ()
    prunable: bool = True

    @property
    def rotates(self) -> bool:
        return self.enters == "rotation"

    @property
    def biases_scores(self) -> bool:
        return self.enters == "scores"

    @property
    def has_table(self) -> bool:
        """Whether the model has a vector for each position, and therefore a longest sequence."""
        return self.enters == "embeddings"

    def load(self) -> Any:
        """The function that `target` names."""
        assert self.target is not None
        return load_target(self.target)


def _rotation_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.head_width % 2 and (config.head_dim or config.hidden_size % config.num_heads == 0):
        yield Fault("head_dim", config.head_width, f"must be even with position {config.position} (channels rotate in pairs)")
    elif rotated_channels(config, config.head_width) is None:
        wanted = f"must leave an even number of the {config.head_width} channels of a head, at least 2, for the rotation"
        yield Fault("rope_fraction", config.rope_fraction, wanted)


def rotated_channels(config: ModelConfig, width: int) -> int | None:
    """How many of `width` channels turn, by `rope_fraction`; None if that is no even number above 0."""
    channels = round(config.rope_fraction * width)
    exact = abs(channels - config.rope_fraction * width) < 1e-6 * width
    return channels if exact and channels and channels % 2 == 0 else None


_POSITIONS = {
    "learned": PositionKind("embeddings", options=("max_position_embeddings",)),
    "rope": PositionKind("rotation", "model.positions.rotary:rotary_tables", ("rope_theta", "rope_fraction"), _rotation_faults),
    # A head's slope depends on its number among all heads.
    "alibi": PositionKind("scores", "model.positions.alibi:alibi_slopes", prunable=False),
    "none": PositionKind("nowhere"),
}


def position_names() -> list[str]:
    """All values of `model.position`."""
    return list(_POSITIONS)


def position_kind(config: ModelConfig) -> PositionKind:
    """The entry of `config.position`."""
    return _POSITIONS[config.position]


def position_faults(model: ModelConfig) -> Iterator[Fault]:
    """What the schema cannot know about `position` and the fields that only some positions read; keys within the section."""
    kind = position_kind(model)
    yield from kind.faults(model)
    if model.no_position_every is not None and not (kind.rotates or kind.biases_scores):
        wanted = f"position {model.position} does not enter single layers; set it to null, or take rope or alibi"
        yield Fault("no_position_every", model.no_position_every, wanted)
    for name, other in _POSITIONS.items():
        for field in other.options:
            if field not in kind.options and model.changed(field):
                yield Fault(
                    field, getattr(model, field), f"only position {name} has it; set it to {ModelConfig.default(field)}"
                )
