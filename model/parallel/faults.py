"""How many tensor-parallel ranks a model can be sharded over, and faults for other numbers. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from configs.packages import lacks
from configs.schema import DataConfig, Fault, ModelConfig, ParallelConfig, Section, TrainingConfig
from model.attention.faults import known_attention
from model.attention.registry import model_projections
from model.attention.variant import Projection


def tensor_sizes(model: ModelConfig) -> list[int]:
    """The numbers of tensor-parallel ranks that the model can be sharded over in equal shards, smallest first.

    t divides the query heads and the MLP's width. t divides the key/value heads, or they divide t and t divides the rows of
    their weight. t divides the columns of a projection that all heads read; seeds of it divide t or are divided by it.
    """
    parts = [one for _, one in model_projections(model)]

    def splits(t: int) -> bool:
        if model.num_heads % t or model.ffn_width % t:
            return False
        return all(_splits(one, t) for one in parts)

    return [t for t in range(1, model.num_heads + 1) if splits(t)]


def _splits(projection: Projection, t: int) -> bool:
    """Whether t ranks can have equal shares of a projection, given that they have equal shares of heads."""
    parts = projection.groups if projection.kind == "expand" else projection.parts
    whole = parts % t == 0 or t % parts == 0
    if projection.kind == "key_value":
        return parts % t == 0 or (whole and projection.columns % t == 0)
    return whole and projection.columns % t == 0 if projection.kind in ("shared", "expand") else True


def tensor_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """Faults of the `parallel` section for this model and data."""
    model, parallel, data, training = (sections.get(name) for name in ("model", "parallel", "data", "training"))
    if not isinstance(model, ModelConfig) or not isinstance(parallel, ParallelConfig) or not known_attention(model):
        return []
    faults = []
    if parallel.tensor > 1 and (why := lacks("megatron-core")):
        faults.append(Fault("parallel.tensor", parallel.tensor, why))
    if parallel.mhe_gather != "auto" and not any(one.is_gathered(parallel.tensor) for _, one in model_projections(model)):
        wanted = f"{' and '.join(dict.fromkeys(model.pattern))} projects nothing that ranks gather; set it to auto"
        faults.append(Fault("parallel.mhe_gather", parallel.mhe_gather, wanted))
    sizes = tensor_sizes(model) if parallel.tensor > 1 else [1]
    if parallel.tensor not in sizes:
        wanted = f"must divide {_split_counts(model)}: {', '.join(map(str, sizes))}"
        faults.append(Fault("parallel.tensor", parallel.tensor, wanted))
    if parallel.sequence and isinstance(data, DataConfig):
        length = data.sequence_length
        row = training.row_length(length) if isinstance(training, TrainingConfig) else length
        if row % parallel.tensor:
            what = "must be" if row == length else f"makes rows of {row} tokens with their sentinels, which must be"
            wanted = f"{what} a multiple of parallel.tensor ({parallel.tensor}) with parallel.sequence"
            faults.append(Fault("data.sequence_length", length, wanted))
    return faults


def _split_counts(model: ModelConfig) -> str:
    """What a tensor-parallel size must divide, as text."""
    counts, others = [f"num_heads ({model.num_heads})", f"MLP width ({model.ffn_width})"], []
    for name, one in dict.fromkeys(model_projections(model)):
        stored = f"the {one.columns} columns of {name}"
        if one.kind == "shared" or (one.kind == "key_value" and one.parts == 1):
            counts.append(stored)
        if one.kind == "shared" and one.parts > 1:
            others.append(f"{one.parts} seeds or be a multiple of them")
        if one.kind == "key_value" and 1 < one.parts < model.num_heads:
            others.append(f"{one.parts} key/value heads or, as a multiple of that, {stored}")
        if one.kind == "expand" and one.groups > 1:
            others.append(f"{one.groups} latents or be a multiple of them")
    *first, last = dict.fromkeys(counts)
    return ", and ".join([f"{', '.join(first)} and {last}", *dict.fromkeys(others)])
