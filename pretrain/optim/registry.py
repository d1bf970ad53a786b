"""Optimizers by name, the only place that tells them apart. To add one, add an entry here and a file beside this one.

Torch-free, so that a configuration is checked and its memory counted without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import Fault, OptimizerConfig, Section
from configs.targets import load_target

if TYPE_CHECKING:
    from pretrain.optim.groups import Recipe

BYTES = 4  # every kind of state is float32


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: how it is built and what it keeps.

    `target` is a `Recipe` (pretrain/optim/groups.py) as "module:Class". `states` names the tensors it keeps for each parameter
    beside the fp32 weights, float32 and of the parameter's shape, under torch's keys; checkpoints store them under these
    names. Its only other state is `step`, the number of steps taken. `unsharded_matrices`: a step needs a parameter's
    unsharded gradient, so that sharding optimizers (ZeRO, FSDP) must gather it first.
    """

    target: str
    states: tuple[str, ...]
    unsharded_matrices: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes that `states` take for each value of the model."""
        return BYTES * len(self.states)


_KINDS = {
    "adamw": OptimizerKind("pretrain.optim.adamw:AdamW", states=("exp_avg", "exp_avg_sq")),
}


def optimizer_kind(name: str) -> OptimizerKind:
    """The entry of `optimizer.kind`; KeyError where there is none."""
    return _KINDS[name]


def optimizer_recipe(name: str) -> Recipe:
    """What groups the parameters of a model for the optimizer `name`, and builds it."""
    recipe: Recipe = load_target(_KINDS[name].target)()
    return recipe


def optimizer_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What the schema cannot know about the `optimizer` section."""
    optimizer = sections.get("optimizer")
    if not isinstance(optimizer, OptimizerConfig) or optimizer.kind in _KINDS:
        return []
    return [Fault("optimizer.kind", optimizer.kind, f"known: {', '.join(_KINDS)}")]
