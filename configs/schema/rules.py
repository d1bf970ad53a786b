"""Rules between sections of a configuration, whatever its engine and variants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from configs.schema.base import Fault
from configs.schema.checkpoint import CheckpointConfig
from configs.schema.data import DataConfig
from configs.schema.gha import GHAConfig
from configs.schema.logging import LoggingConfig
from configs.schema.model import ModelConfig
from configs.schema.parallel import ParallelConfig
from configs.schema.schedule import ScheduleConfig
from configs.schema.training import AverageConfig, TrainingConfig
from configs.schema.validation import ValidationConfig


def cross_faults(sections: Mapping[str, object], world_size: int) -> Iterator[Fault]:
    """Faults between sections. `sections` holds those that are valid by themselves; `world_size` counts the processes."""
    model, data, training = sections.get("model"), sections.get("data"), sections.get("training")
    parallel, schedule = sections.get("parallel"), sections.get("schedule")
    if isinstance(model, ModelConfig) and isinstance(data, DataConfig):
        row = training.row_length(data.sequence_length) if isinstance(training, TrainingConfig) else data.sequence_length
        yield from _length_faults(model, data, row)
        yield from _document_faults(model, data)
    if isinstance(parallel, ParallelConfig):
        yield from _layout_faults(parallel, training, world_size)
        if isinstance(model, ModelConfig) and parallel.pipeline > model.num_layers:
            yield Fault("parallel.pipeline", parallel.pipeline, f"at most model.num_layers ({model.num_layers})")
    if isinstance(data, DataConfig) and data.streams and isinstance(training, TrainingConfig):
        ranks = world_size // (parallel.tensor * parallel.pipeline) if isinstance(parallel, ParallelConfig) else 1
        yield from _stream_faults(data.stream.shards, training, max(1, ranks))
    if isinstance(training, TrainingConfig) and isinstance(schedule, ScheduleConfig):
        yield from _schedule_faults(training, schedule)
    checkpoint = sections.get("checkpoint")
    if isinstance(training, TrainingConfig) and isinstance(checkpoint, CheckpointConfig):
        yield from _average_faults(training.average, checkpoint)
    logging, validation = sections.get("logging"), sections.get("validation")
    if isinstance(logging, LoggingConfig) and isinstance(validation, ValidationConfig) and isinstance(data, DataConfig):
        yield from _heads_faults(logging, validation, data)
    gha = sections.get("gha")
    if isinstance(gha, GHAConfig) and gha.stage != "off":
        yield from _grouping_faults(gha, model, training)


def _heads_faults(logging: LoggingConfig, validation: ValidationConfig, data: DataConfig) -> Iterator[Fault]:
    """What is measured on validation text needs some."""
    if logging.heads and data.streams and not validation.sets:
        yield Fault("logging.heads", True, "is measured on validation text: name validation.sets, because a stream has none")


def _length_faults(model: ModelConfig, data: DataConfig, row: int) -> Iterator[Fault]:
    """What the model has for each place of a sequence must suffice for a row of so many tokens."""
    for field in ("max_position_embeddings", "linformer_tokens"):
        longest = getattr(model, field)
        if longest is not None and row > longest:
            wanted = f"at most model.{field} ({longest})"
            of_row = "" if row == data.sequence_length else f", which the {row} tokens of a row with its sentinels exceed"
            yield Fault("data.sequence_length", data.sequence_length, wanted + of_row)
    if model.linformer_tokens is None and model.linformer_length is not None and model.linformer_length > row:
        wanted = f"at most data.sequence_length: a row has {row} tokens, which are projected to it"
        yield Fault("model.linformer_length", model.linformer_length, wanted)


def _document_faults(model: ModelConfig, data: DataConfig) -> Iterator[Fault]:
    """Model and data must agree on whether documents are kept apart."""
    across = model.attend_across_documents
    if across and data.keeps_documents_apart:
        wanted = f"data.packing {data.packing} keeps documents apart; set it to null, or take data.packing concatenate"
        yield Fault("model.attend_across_documents", across, wanted)
    elif model.end_of_document is not None and not (model.separates_documents or data.keeps_documents_apart):
        wanted = "used only with attend_across_documents false; set it to null"
        yield Fault("model.end_of_document", model.end_of_document, wanted)


def _layout_faults(parallel: ParallelConfig, training: object, world_size: int) -> Iterator[Fault]:
    """Processes, layout and batch must divide evenly."""
    tensor, stages = parallel.tensor, parallel.pipeline
    names = ["tensor"] * (tensor > 1) + ["pipeline"] * (stages > 1)
    if world_size % (tensor * stages):
        sizes, text = {"tensor": tensor, "pipeline": stages}, f"must divide the number of processes ({world_size})"
        if len(names) == 1:
            yield Fault(f"parallel.{names[0]}", sizes[names[0]], text)
        else:
            yield Fault("parallel.tensor", tensor, f"times parallel.pipeline ({tensor} * {stages}) {text}")
        return
    data_size = world_size // (tensor * stages)
    if data_size % parallel.replicate:
        yield Fault("parallel.replicate", parallel.replicate, f"must divide the data-parallel ranks ({data_size})")
    if not isinstance(training, TrainingConfig):
        return
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % (micro * data_size):
        processes = " / ".join(["processes", *(f"parallel.{name}" for name in names)])
        numbers = " / ".join([f"{micro} * {world_size}", *(str(size) for size in (tensor, stages) if size > 1)])
        yield Fault("training.global_batch_size", batch, f"must be a multiple of micro_batch_size * {processes} ({numbers})")
    elif batch // (micro * data_size) < stages:
        yield Fault(
            "training.global_batch_size",
            batch,
            f"at least parallel.pipeline ({stages}) micro-batches for each pipeline ({micro} * {data_size} samples at a time), "
            "otherwise stages never work at the same time",
        )


def _stream_faults(streams: int, training: TrainingConfig, ranks: int) -> Iterator[Fault]:
    """Each data-parallel rank reads its own streams, in every run that resumes."""
    if streams % ranks:
        able = ", ".join(str(count) for count in range(1, streams + 1) if streams % count == 0)
        wanted = f"a multiple of the data-parallel ranks ({ranks}), such as {ranks * max(1, streams // ranks)}"
        yield Fault("data.stream.shards", streams, f"{wanted}; a run that began with {streams} resumes on {able} ranks")
    common = math.gcd(streams, training.global_batch_size)
    if any(bound % common for bounds in training.skip_samples for bound in bounds):
        wanted = f"with data.stream, bounds that {common} divides (data.stream.shards and training.global_batch_size share it)"
        yield Fault("training.skip_samples", training.skip_samples, wanted)


def _grouping_faults(gha: GHAConfig, model: object, training: object) -> Iterator[Fault]:
    if isinstance(model, ModelConfig):
        name, groups = ("groups", gha.groups) if gha.groups is not None else ("max_groups", gha.max_groups)
        if groups >= model.num_heads:
            yield Fault(f"gha.{name}", groups, f"must be below model.num_heads ({model.num_heads})")
        elif gha.stage != "constrain" and groups * gha.heads_per_group >= model.num_heads:
            wanted = f"times gha.{name} ({groups}) must be below model.num_heads ({model.num_heads})"
            yield Fault("gha.heads_per_group", gha.heads_per_group, wanted)
    if isinstance(training, TrainingConfig) and gha.stage == "schedule" and (gha.vote_at_step or 0) >= training.steps:
        yield Fault("gha.vote_at_step", gha.vote_at_step, f"must be below training.steps ({training.steps})")


def _average_faults(average: AverageConfig, checkpoint: CheckpointConfig) -> Iterator[Fault]:
    if average.last is not None and checkpoint.every_steps == 0:
        yield Fault(
            "training.average.last", average.last, "needs checkpoint.every_steps above 0: it averages the weights of such saves"
        )


def _schedule_faults(training: TrainingConfig, schedule: ScheduleConfig) -> Iterator[Fault]:
    after_warmup = training.steps - schedule.warmup_steps
    if after_warmup <= 0:
        yield Fault("schedule.warmup_steps", schedule.warmup_steps, f"must be below training.steps ({training.steps})")
    elif (schedule.decay_steps or 0) > after_warmup:
        yield Fault("schedule.decay_steps", schedule.decay_steps, f"at most training.steps - warmup_steps ({after_warmup})")
