"""Build the parts of a run: engine, data, hooks, and the trainer that drives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from configs.schema import Config
from data_pipeline.mix.mixture import training_samples, training_sources
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import Loader, TrainLoader, ValidationLoader
from data_pipeline.read.manifest import TOKENIZER, manifest_sha256
from data_pipeline.read.sets import validation_sets
from data_pipeline.read.task_file import Task, encode_task
from data_pipeline.read.task_loader import TaskLoader
from data_pipeline.read.token_bytes import token_bytes
from data_pipeline.stream.loader import StreamLoader
from data_pipeline.stream.text import StreamedText
from pretrain.backends.base import Backend
from pretrain.checkpoints.resume import Resumer, Start
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.collectives import broadcast_object, together
from pretrain.distributed.layout import Layout
from pretrain.distributed.process import derived_seed
from pretrain.engines import backend_class
from pretrain.grouping.grouping import HeadGrouping
from pretrain.grouping.likeness import SAMPLES, HeadLikeness
from pretrain.grouping.pruned_run import PrunedRun
from pretrain.loop.averaging import average_hooks, left_behind
from pretrain.loop.hooks import Checkpoints, Hook, Validation
from pretrain.loop.interruption import Interruption
from pretrain.loop.mixing import Shares
from pretrain.loop.skipping import Skipping
from pretrain.loop.slowest import SlowestRank
from pretrain.loop.streaming import Positions, SharedBatches
from pretrain.loop.task_scores import TaskScores
from pretrain.loop.trainer import Trainer
from pretrain.objectives.registry import make_objective


def build_trainer(
    config: Config,
    layout: Layout,
    start: Start | None = None,
    others: Sequence[Hook] = (),
    interruption: Interruption | None = None,
    text: StreamedText | None = None,
) -> Trainer:
    """Model, engine, data and hooks of a resolved config, restored from `start` when given.

    `others` are hooks beside those that the config asks for. `interruption` tells the loop of signals to stop. `text` is what
    `streamed_text` gave, if that is known already.
    """
    text = text or streamed_text(config)
    resumer = make_resumer(config, layout, text)
    measuring: list[Hook] = []
    if validation_sets(config.data, config.validation):
        measuring.append(_validation(config, layout, resumer.tokenizer))
    if config.validation.tasks:
        measuring.append(_task_scores(config, layout, resumer.tokenizer))
    backend = make_backend(config, layout, None if start is None else start.folder)
    first_step = 0 if start is None else start.train.step
    torch.manual_seed(dropout_seed(config, layout, first_step))
    if start is not None:
        resumer.restore(start, backend.load_state)
    saver = Saver(resumer.store, layout, config, resumer.data_sha256, resumer.tokenizer)
    hooks = [*others, Skipping(config, layout), *measuring, Checkpoints(saver, config.checkpoint.every_steps)]
    if layout.world_size > 1:
        hooks.append(SlowestRank(config, layout))
    if config.gha.stage != "off":
        hooks.append(HeadGrouping(config, layout, backend.module, backend.layers, first_step))
    if config.logging.heads:
        hooks.append(HeadLikeness(config, layout, backend, _held_out(config, layout)))
    if pruned_run := PrunedRun.of(Path(config.run.folder)):
        hooks.append(pruned_run)
    if len(config.data.parts) > 1:
        hooks.append(Shares(config))
    hooks += average_hooks(config, backend)
    loader, said = _train_loader(config, layout, text, hooks)
    if start is not None:
        read = resumer.reading(start)
        said += [line for hook in hooks for line in (hook.load(start.folder), hook.load_state(start, read))]
        said.append(left_behind(config, start))
    trainer = Trainer(config, layout, backend, loader, hooks, first_step, interruption)
    for line in filter(None, said):
        trainer.progress.say(line)
    return trainer


def streamed_text(config: Config) -> StreamedText | None:
    """What the run streams, if it does: the first rank looks for the files. UserError on every rank if there are none."""
    if not config.data.streams:
        return None
    found: list[StreamedText] = []
    together(lambda: found.append(StreamedText.of(config.data)), main_only=True)
    text: StreamedText = broadcast_object(found[0] if found else None)
    return text


def make_resumer(config: Config, layout: Layout, text: StreamedText | None = None) -> Resumer:
    """Finds and loads what a run of this resolved config can resume from; `text` as for `build_trainer`."""
    store = CheckpointStore(Path(config.run.folder))
    if text := text or streamed_text(config):
        return Resumer(store, layout, config, text.sha256, text.tokenizer)
    folders = [Path(source.path) for source in config.data.parts]
    tokenizer = (folders[0] / TOKENIZER).read_bytes().decode()
    return Resumer(store, layout, config, ",".join(map(manifest_sha256, folders)), tokenizer)


def _train_loader(
    config: Config, layout: Layout, text: StreamedText | None, hooks: list[Hook]
) -> tuple[Loader, list[str | None]]:
    """This rank's part of the training data, and lines for the user. `hooks` get those that this kind of data has."""
    training = config.training
    if text is not None:
        place, pinned = (layout.coordinate("data"), layout.size("data")), layout.device.type == "cuda"
        stream = StreamLoader(config, text, *place, pin_memory=pinned)
        hooks.append(Positions(config, layout, stream, text.sha256))
        return SharedBatches(stream, layout), []
    sources = training_sources(config)
    sizes = (training.global_batch_size, training.micro_batch_size, layout.coordinate("data"), layout.size("data"))
    samples, on_gpu = training_samples(config, sources), layout.device.type == "cuda"
    loader = TrainLoader(samples, *sizes, steps=training.steps, seed=config.run.seed, pin_memory=on_gpu)
    return loader, [_packing(config, sources)]


def _validation(config: Config, layout: Layout, tokenizer: str) -> Validation:
    """What measures the validation sets, of which each rank has its part."""
    bytes_of_token_V = torch.from_numpy(token_bytes(json.loads(tokenizer)))
    text_bytes = partial(make_objective(config).text_bytes, bytes_of_token_V=bytes_of_token_V)
    place = (config.training.micro_batch_size, layout.coordinate("data"), layout.size("data"))
    data = config.data
    sets = {
        name: ValidationLoader(
            TokenDataset(folder, "valid", data.sequence_length, packing=data.packing), config.validation.samples, *place
        )
        for name, folder in validation_sets(data, config.validation).items()
    }
    return Validation(sets, config.validation.every_steps, text_bytes)


def _held_out(config: Config, layout: Layout) -> ValidationLoader:
    """A few samples of the first validation set: as many for each rank, so that none only fills up a batch and counts twice."""
    folder = next(iter(validation_sets(config.data, config.validation).values()))
    dataset = TokenDataset(folder, "valid", config.data.sequence_length, packing=config.data.packing)
    micro, ranks = config.training.micro_batch_size, layout.size("data")
    fitting = min(SAMPLES, dataset.samples_per_epoch) // (micro * ranks) * micro * ranks
    return ValidationLoader(dataset, max(fitting, micro * ranks), micro, layout.coordinate("data"), ranks)


def _task_scores(config: Config, layout: Layout, tokenizer: str) -> TaskScores:
    """What scores the tasks. The first rank reads and encodes them for all; UserError if that is impossible."""
    validation, length = config.validation, config.data.sequence_length
    read: list[Task] = []

    def encode() -> None:
        from data_pipeline.prepare.tokenizer import Tokenizer  # here: only tasks need its libraries

        encoder = Tokenizer(tokenizer, config.data.tokenizer)
        read.extend(encode_task(name, Path(path), encoder, length) for name, path in validation.tasks.items())

    together(encode, main_only=True)
    place = (config.training.micro_batch_size, layout.coordinate("data"), layout.size("data"))
    tasks = [TaskLoader(task, length, *place) for task in broadcast_object(read)]
    every_steps = validation.every_steps if validation.tasks_every_steps is None else validation.tasks_every_steps
    return TaskScores(tasks, every_steps)


def _packing(config: Config, sources: Sequence[TokenDataset]) -> str | None:
    """What becomes of the training data's tokens where documents are kept apart."""
    data = config.data
    if not data.keeps_documents_apart:
        return None
    of_sources = [f"{source.label}: {opened.packed()}" for source, opened in zip(data.parts, sources, strict=True)]
    return f"packing {data.packing}; " + "\n        ".join(of_sources)


def dropout_seed(config: Config, layout: Layout, first_step: int) -> int:
    """The seed of this rank's generators.

    Set it after building the model: how much building draws from the generators depends on the layout. Ranks that hold the
    same hidden states drop the same ones; with sequence parallelism each rank holds, and drops, its own. A run that resumes
    on the same layout restores the generators from its checkpoint instead.
    """
    by_replica = layout.coordinate("pipeline") * layout.size("data") + layout.coordinate("data")
    rank = layout.rank if config.parallel.sequence else by_replica
    return derived_seed(config.run.seed, f"dropout from step {first_step}" if first_step else "dropout", rank)


def make_backend(config: Config, layout: Layout, checkpoint: Path | None = None) -> Backend:
    """The engine of a resolved config, with initial weights. Every rank calls it, with an open layout.

    `checkpoint` is the one it will load: a pipeline keeps that checkpoint's stages.
    """
    return backend_class(config)(config, layout, checkpoint)
