"""Optimizers by name, the only place that tells them apart. To add one, add an entry here and a file beside this one.

Torch-free, so that a configuration is checked without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from configs.schema import Fault, ModelConfig, OptimizerConfig, ParallelConfig, Section
from configs.targets import load_target
from model.attention.faults import known_attention
from model.attention.registry import has_head_embeddings, layer_kinds

if TYPE_CHECKING:
    from pretrain.optim.groups import Recipe

BYTES = 4  # every kind of state is float32


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps of each parameter of a group, under torch's keys; checkpoints store it under these names.

    `states` are tensors, float32 and of the parameter's shape, zero before the first step. `scalars` are numbers by their value
    before the first step; all parameters that have one of them have the same.
    """

    states: tuple[str, ...] = ()
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes that `states` take for each value of a parameter."""
        return BYTES * len(self.states)


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: how it is built and what it keeps.

    `target` is a `Recipe` (pretrain/optim/groups.py) as "module:Class". `groups` says what it keeps beside the fp32 weights, by
    the names that the recipe gives to its groups of parameters. `unsharded_matrices`: a step needs each parameter and its
    gradient unsharded and in its shape, which engines that shard them refuse.
    """

    target: str
    groups: Mapping[str, Kept]
    unsharded_matrices: bool = False


_MOMENTS = Kept(("exp_avg", "exp_avg_sq"), {"step": 0.0})

_KINDS = {
    "adamw": OptimizerKind("pretrain.optim.adamw:AdamW", groups={"decayed": _MOMENTS, "spared": _MOMENTS}),
}


def optimizer_names() -> list[str]:
    """All values of `optimizer.kind`."""
    return list(_KINDS)


def optimizer_kind(name: str) -> OptimizerKind:
    """The entry of `optimizer.kind`; KeyError where there is none."""
    return _KINDS[name]


def optimizer_recipe(name: str) -> Recipe:
    """What groups the parameters of a model for the optimizer `name`, and builds it."""
    recipe: Recipe = load_target(_KINDS[name].target)()
    return recipe


def optimizer_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What the schema cannot know about the `optimizer` section."""
    optimizer, model, parallel = (sections.get(name) for name in ("optimizer", "model", "parallel"))
    faults: list[Fault] = []
    if not isinstance(optimizer, OptimizerConfig):
        return []
    if optimizer.kind not in _KINDS:
        faults.append(Fault("optimizer.kind", optimizer.kind, f"known: {', '.join(optimizer_names())}"))
    scale = optimizer.head_embedding_lr_scale
    if scale != 1 and isinstance(model, ModelConfig) and known_attention(model):
        stages = parallel.pipeline if isinstance(parallel, ParallelConfig) else 1
        if not has_head_embeddings(model):
            faults.append(Fault("optimizer.head_embedding_lr_scale", scale, "the model has no head embeddings; set it to 1"))
        elif stages > 1 and not all(map(has_head_embeddings, layer_kinds(model))):
            # DeepSpeed needs the same groups of parameters on all stages.
            wanted = "with parallel.pipeline the layers of every stage need head embeddings: one attention for all, or 1"
            faults.append(Fault("optimizer.head_embedding_lr_scale", scale, wanted))
    return faults
