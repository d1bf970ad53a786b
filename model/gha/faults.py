"""What the schema cannot know about the `gha` section: which heads can be distinguished and pruned. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from configs.schema import Fault, GHAConfig, ModelConfig, ParallelConfig, Section
from model.attention.faults import known_attention
from model.attention.registry import attention_names, attention_variant, layer_kinds, variant_of
from model.attention.variant import Variant
from model.positions.registry import position_kind


def gha_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """Faults of the `gha` section for this model and its number of tensor-parallel ranks."""
    model, gha, parallel = sections.get("model"), sections.get("gha"), sections.get("parallel")
    if not isinstance(model, ModelConfig) or not isinstance(gha, GHAConfig) or not known_attention(model):
        return []
    if gha.stage == "off":
        return []
    tensor, faults = parallel.tensor if isinstance(parallel, ParallelConfig) else 1, []
    for layer in layer_kinds(model):
        variant = variant_of(layer)
        if variant.maps:
            faults += [*_of_model(layer, gha, variant), *_of_schedule(layer, gha, variant, tensor)]
        else:
            faults.append(Fault("gha.stage", gha.stage, unprunable(str(layer.attention))))
    if gha.stage != "constrain" and (why := mixed_refusal(model)):
        faults.append(Fault("gha.stage", gha.stage, f"{why}; constrain only"))
    return list(dict.fromkeys(faults))


def mixed_refusal(model: ModelConfig) -> str | None:
    """Why heads of a model with several variants of attention cannot be pruned; None if they can."""
    following = [layer for layer in layer_kinds(model) if (p := variant_of(layer).pruning) and p.follows_vote(layer)]
    if len(model.pattern) == 1 or not following:
        return None
    if following[0].num_seeds > 1:
        return "how many seeds stay depends on the heads that are kept, layer by layer; take model.num_seeds 1, or one variant"
    name = following[0].attention
    return f"how much of {name}'s keys and values stays depends on the heads that are kept, layer by layer; take one variant"


def unprunable(attention: str) -> str:
    """Why heads of this variant cannot be grouped, and of which variants they can."""
    able = [name for name in attention_names() if attention_variant(name).pruning]
    return f"the heads of {attention} cannot be told apart or pruned; only those of {', '.join(able)}"


def _of_model(model: ModelConfig, gha: GHAConfig, variant: Variant) -> Iterator[Fault]:
    maps = [kind for kind in variant.maps if kind != "value" or not variant.shares_values(model)]
    if gha.feature_map not in maps:
        lacking = "have no single softmax" if gha.feature_map == "attention" else "share their values"
        wanted = f"the heads of {model.attention} {lacking}; take {' or '.join(maps)}"
        yield Fault("gha.feature_map", gha.feature_map, wanted)
    if gha.feature_map == "attention" and (model.attention_sinks or model.logit_softcap is not None):
        wanted = "weights are compared as without model.attention_sinks and model.logit_softcap; take value or output"
        yield Fault("gha.feature_map", gha.feature_map, wanted)
    if not model.head_embeddings:
        yield Fault(
            "gha.stage",
            gha.stage,
            "without model.head_embeddings the heads of a seed share keys and values: only heads with embeddings are grouped",
        )
    if gha.stage != "constrain" and variant.pruning is None:
        yield Fault("gha.stage", gha.stage, f"{unprunable(str(model.attention))}; constrain only")
    if gha.stage != "constrain" and not position_kind(model).prunable:
        wanted = f"with position {model.position} a head's slope depends on its number, so none can be pruned; constrain only"
        yield Fault("gha.stage", gha.stage, wanted)


def _of_schedule(model: ModelConfig, gha: GHAConfig, variant: Variant, tensor: int) -> Iterator[Fault]:
    """A schedule prunes heads by itself, so the heads that it keeps must fit the ranks."""
    if gha.stage != "schedule":
        return
    if variant.pruning and variant.pruning.follows_vote(model) and tensor > 1:
        shared = "seeds" if model.num_seeds > 1 else "latents" if model.num_latents else "key/value heads"
        wanted = (
            f"which {shared} of {model.attention} are kept is known only after the vote; with parallel.tensor take "
            "constrain, then vote"
        )
        yield Fault("gha.stage", gha.stage, wanted)
    if gha.heads_per_group * (gha.groups or 1) % tensor:
        times = "" if gha.groups is None else f"times gha.groups ({gha.groups}) "
        wanted = f"{times}must be a multiple of parallel.tensor ({tensor}): the heads that are kept are sharded over ranks"
        yield Fault("gha.heads_per_group", gha.heads_per_group, wanted)
