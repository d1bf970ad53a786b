"""How many tensor-parallel ranks a model can be sharded over, and faults for other numbers. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from configs.packages import lacks
from configs.schema import DataConfig, Fault, ModelConfig, ParallelConfig, Section, TrainingConfig
from model.attention.faults import only
from model.attention.registry import attention_names, attention_variant


def tensor_sizes(model: ModelConfig) -> list[int]:
    """The numbers of tensor-parallel ranks that the model can be sharded over in equal shards, smallest first.

    t divides the query heads and the MLP's width. t divides the key/value heads, or they divide t and t divides the rows of
    their weight. t divides the columns of a projection that all heads read; seeds of it divide t or are divided by it.
    """
    variant, heads = attention_variant(model.attention), model.num_heads
    key_value_heads, shared, seeds = variant.key_value_heads(model), variant.shared(model), variant.seeds(model)

    def splits(t: int) -> bool:
        few = key_value_heads % t != 0
        if few and (t % key_value_heads or 2 * key_value_heads * model.head_width % t):
            return False
        whole = seeds % t == 0 or t % seeds == 0
        return heads % t == 0 and model.ffn_width % t == 0 and shared % t == 0 and whole

    return [t for t in range(1, heads + 1) if splits(t)]


def tensor_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """Faults of the `parallel` section for this model and data."""
    model, parallel, data, training = (sections.get(name) for name in ("model", "parallel", "data", "training"))
    if (
        not isinstance(model, ModelConfig)
        or not isinstance(parallel, ParallelConfig)
        or model.attention not in attention_names()
    ):
        return []
    faults = []
    if parallel.tensor > 1 and (why := lacks("megatron-core")):
        faults.append(Fault("parallel.tensor", parallel.tensor, why))
    if parallel.mhe_gather != "auto" and not attention_variant(model.attention).shared(model):
        readers = [name for name in attention_names() if attention_variant(name).shared(model)]
        faults.append(Fault("parallel.mhe_gather", parallel.mhe_gather, f"{only(readers, model.attention)}; set it to auto"))
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
    variant, counts = attention_variant(model.attention), [f"num_heads ({model.num_heads})", f"MLP width ({model.ffn_width})"]
    key_value_heads, shared = variant.key_value_heads(model), variant.shared(model)
    if shared:
        counts.append(f"{shared // model.head_width} * head_dim ({shared})")
    if key_value_heads == 1:
        counts.append(f"2 * head_dim ({2 * model.head_width})")
    *first, last = counts
    text = f"{', '.join(first)} and {last}"
    if (seeds := variant.seeds(model)) > 1:
        text += f", and {seeds} seeds or be a multiple of them"
    if 1 < key_value_heads < model.num_heads:
        stored = f"{2 * key_value_heads} * head_dim ({2 * key_value_heads * model.head_width})"
        text += f", and {key_value_heads} key/value heads or, as a multiple of that, {stored}"
    return text
