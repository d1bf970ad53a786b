"""Training engines by name: the only place that tells them apart. A third engine is an entry here and a file in `backends/`.

Torch-free, so that a configuration is checked before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.packages import lacks
from configs.schema import Config, DataConfig, Fault, OptimizerConfig, ParallelConfig, Section, TrainingConfig
from configs.targets import load_target
from model.costs.memory import Sharding
from pretrain.optim.registry import optimizer_faults, optimizer_kind

if TYPE_CHECKING:
    from pretrain.backends.base import Backend

Sections = Mapping[str, Any]  # sections of a configuration that are valid by themselves, and the value of `backend`


@dataclass(frozen=True)
class Engine:
    """One training engine: its class, the fields that it reads, how it is launched and what it keeps in memory.

    `target` is the `Backend` of a configuration as "module:Class"; `package` is what it imports beside torch, if anything.
    `label` says for people how it shards. `launcher` starts it on the devices of one node. `sharding` is its plan of
    model/costs/memory.py.

    `options` are the dotted fields that it reads and another engine may not; those stay at their defaults elsewhere.
    `precisions` are the values of training.precision that it knows. `faults` yields what is wrong with its own fields.

    `unsharded`: whether the optimizer's step sees unsharded parameters, as some optimizers need.

    `ordered_kernels`: with tensor parallelism kernels must start in the order of their calls (CUDA_DEVICE_MAX_CONNECTIONS=1),
    so that Megatron's layers hide what they send behind their products.
    """

    target: Callable[[Config], str]
    package: str | None
    label: Callable[[ParallelConfig], str]
    launcher: str
    sharding: Callable[[ParallelConfig], Sharding]
    options: tuple[str, ...]
    precisions: tuple[str, ...]
    faults: Callable[[Sections], Iterator[Fault]]
    unsharded: Callable[[ParallelConfig], bool]
    ordered_kernels: bool


def _deepspeed_target(config: Config) -> str:
    if config.parallel.pipeline > 1:
        return "pretrain.backends.pipeline:PipelineBackend"
    return "pretrain.backends.deepspeed:DeepSpeedBackend"


def _deepspeed_faults(sections: Sections) -> Iterator[Fault]:
    parallel, training = sections.get("parallel"), sections.get("training")
    if not isinstance(parallel, ParallelConfig):
        return
    if parallel.pipeline > 1 and parallel.zero_stage > 1:
        yield Fault(
            "parallel.zero_stage", parallel.zero_stage, "0 or 1 with parallel.pipeline: stages keep unsharded gradients"
        )
    if parallel.cpu_offload and parallel.zero_stage == 0:
        yield Fault("parallel.cpu_offload", True, "needs parallel.zero_stage 1, 2 or 3: stage 0 has no optimizer of its own")
    if parallel.cpu_offload and parallel.pipeline > 1:
        yield Fault("parallel.cpu_offload", True, "not together with parallel.pipeline")
    if parallel.pipeline == 1 and parallel.pipeline_balance == "time":
        yield Fault(
            "parallel.pipeline_balance", "time", "only parallel.pipeline above 1 has a use for it; set it to parameters"
        )
    if isinstance(training, TrainingConfig) and training.precision == "bf16" and parallel.zero_stage == 0:
        wanted = "1, 2 or 3 with precision bf16: DeepSpeed keeps no fp32 master weights at stage 0"
        yield Fault("parallel.zero_stage", 0, wanted)


def _deepspeed_sharding(parallel: ParallelConfig) -> Sharding:
    stages: tuple[Sharding, ...] = ("zero0", "zero1", "zero2", "zero3")
    return stages[parallel.zero_stage]


def _fsdp_faults(sections: Sections) -> Iterator[Fault]:
    parallel, training, data = (sections.get(name) for name in ("parallel", "training", "data"))
    if not isinstance(training, TrainingConfig) or training.precision != "fp8":
        return
    if isinstance(parallel, ParallelConfig) and parallel.tensor > 1:
        yield Fault("training.precision", "fp8", "not together with parallel.tensor; take bf16")
    micro = training.micro_batch_size
    if isinstance(data, DataConfig) and micro * (row := training.row_length(data.sequence_length)) % 16:
        length = "data.sequence_length" if row == data.sequence_length else "the tokens of a row"
        wanted = f"times {length} ({row}) must be a multiple of 16 with precision fp8"
        yield Fault("training.micro_batch_size", micro, wanted)


def _fsdp_label(parallel: ParallelConfig) -> str:
    return "fsdp" + (f", {parallel.replicate} replicas" if parallel.replicate > 1 else "")


_ENGINES = {
    "deepspeed": Engine(
        target=_deepspeed_target,
        package="deepspeed",
        label=lambda parallel: f"deepspeed ZeRO {parallel.zero_stage}",
        launcher="deepspeed --log_level warning",
        sharding=_deepspeed_sharding,
        options=("parallel.zero_stage", "parallel.pipeline", "parallel.pipeline_balance"),
        precisions=("fp32", "bf16"),
        faults=_deepspeed_faults,
        unsharded=lambda parallel: parallel.zero_stage == 0 and parallel.tensor == 1,
        ordered_kernels=True,
    ),
    "fsdp": Engine(
        target=lambda config: "pretrain.backends.fsdp:FSDPBackend",
        package=None,
        label=_fsdp_label,
        launcher="torchrun --nproc-per-node=gpu",
        sharding=lambda parallel: "fsdp",
        options=("parallel.replicate", "training.compile"),
        precisions=("fp32", "bf16", "fp8"),
        faults=_fsdp_faults,
        unsharded=lambda parallel: False,
        ordered_kernels=False,  # FSDP hides what it gathers on other streams, all at once
    ),
}


def engine_names() -> list[str]:
    """All values of `backend`."""
    return list(_ENGINES)


def engine(name: str) -> Engine:
    """The entry of `name`; KeyError where there is none."""
    return _ENGINES[name]


def layout_words(config: Config, world_size: int) -> str:
    """Parallelism and engine, such as TP 2 × PP 2 × DP 4, deepspeed ZeRO 1."""
    parallel = config.parallel
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "DP": world_size // (parallel.tensor * parallel.pipeline)}
    text = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "DP")
    return f"{text}, {engine(config.backend).label(parallel)}" + (", CPU offload" if parallel.cpu_offload else "")


def backend_class(config: Config) -> type[Backend]:
    """The class that trains `config`. Only the engine that runs is imported: each takes seconds."""
    backend: type[Backend] = load_target(engine(config.backend).target(config))
    return backend


def engine_faults(sections: Sections) -> list[Fault]:
    """What the schema cannot know about `backend` and the fields that only some engines read."""
    name = sections.get("backend")
    if name not in _ENGINES:
        return [Fault("backend", name, f"known: {', '.join(_ENGINES)}")]
    return [*_missing(name), *_unread(sections, name), *_sharded(sections, name), *_ENGINES[name].faults(sections)]


def _missing(name: str) -> Iterator[Fault]:
    package = _ENGINES[name].package
    if package is not None and (why := lacks(package)):
        yield Fault("backend", name, f"{why}; or take a backend that does without: {', '.join(_without_packages())}")


def _without_packages() -> list[str]:
    return [name for name, entry in _ENGINES.items() if entry.package is None]


def _unread(sections: Sections, name: str) -> Iterator[Fault]:
    """Fields and precisions given to an engine that has no use for them."""
    for option in dict.fromkeys(option for other in _ENGINES.values() for option in other.options):
        section_name, _, field = option.partition(".")
        section = sections.get(section_name)
        if option in _ENGINES[name].options or not isinstance(section, Section):
            continue
        if section.changed(field):
            value = getattr(section, field)
            readers = [other for other, entry in _ENGINES.items() if option in entry.options]
            yield Fault(option, value, f"{_only(readers, name)}; set it to {section.default(field)}")
    training = sections.get("training")
    if isinstance(training, TrainingConfig) and training.precision not in _ENGINES[name].precisions:
        readers = [other for other, entry in _ENGINES.items() if training.precision in entry.precisions]
        yield Fault("training.precision", training.precision, f"{_only(readers, name)}; take {_ENGINES[name].precisions[-1]}")


def _sharded(sections: Sections, name: str) -> Iterator[Fault]:
    """An optimizer that needs unsharded matrices, given to an engine that would shard them."""
    optimizer, parallel = sections.get("optimizer"), sections.get("parallel")
    if not isinstance(optimizer, OptimizerConfig) or not isinstance(parallel, ParallelConfig) or optimizer_faults(sections):
        return
    if optimizer_kind(optimizer.kind).unsharded_matrices and not _ENGINES[name].unsharded(parallel):
        wanted = "needs unsharded matrices: take backend deepspeed with parallel.zero_stage 0 and parallel.tensor 1"
        yield Fault("optimizer.kind", optimizer.kind, wanted)


def _only(readers: list[str], name: str) -> str:
    return f"only backend {' or '.join(readers)} has it, not {name}"
