"""Build the parts of a run: engine, data, hooks, and the trainer that drives them."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.schema import Config
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader, ValidationLoader
from data_pipeline.read.manifest import TOKENIZER, manifest_sha256
from pretrain.backends.base import Backend
from pretrain.backends.registry import backend_class
from pretrain.checkpoints.folder import TrainState
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from pretrain.distributed.process import derived_seed
from pretrain.grouping.grouping import HeadGrouping
from pretrain.loop.hooks import Checkpoints, Hook, Validation
from pretrain.loop.trainer import Trainer


def build_trainer(config: Config, layout: Layout, store: CheckpointStore, checkpoint: Path | None) -> Trainer:
    """Model, engine, data and hooks of a resolved config, restored from `checkpoint` when given."""
    training, data, folder = config.training, config.data, Path(config.data.path)
    tokenizer, data_sha256 = (folder / TOKENIZER).read_bytes().decode(), manifest_sha256(folder)
    state = store.check(checkpoint, config, data_sha256, tokenizer) if checkpoint is not None else None
    backend = make_backend(config, layout, checkpoint)
    first_step = state.step if state is not None else 0
    torch.manual_seed(dropout_seed(config, layout, first_step))
    if checkpoint is not None and state is not None:
        store.restore(checkpoint, config, state, backend.load_state)
    grouping = HeadGrouping(config, layout, backend.module, backend.layers, first_step) if config.gha.stage != "off" else None
    regrouped = None
    if grouping is not None and checkpoint is not None:
        regrouped = grouping.load(checkpoint)

    def save(step: int) -> Path:
        train_state = TrainState(step, layout.world_size, data_sha256)
        write_more = (grouping.save,) if grouping is not None else ()
        saved = store.save(config, train_state, tokenizer, backend.state(), *write_more)
        store.clear_old(config.checkpoint)
        return saved

    train = TokenDataset(folder, "train", data.sequence_length, config.run.seed)
    valid = TokenDataset(folder, "valid", data.sequence_length)
    micro = training.micro_batch_size
    data_rank, data_size = layout.coordinate("data"), layout.size("data")
    loader = TrainLoader(train, training.global_batch_size, micro, data_rank, data_size, steps=training.steps)
    validation = ValidationLoader(valid, config.validation.samples, micro, data_rank, data_size)
    hooks: list[Hook] = [Validation(validation, config.validation.every_steps), Checkpoints(config.checkpoint.every_steps)]
    if grouping is not None:
        hooks.insert(0, grouping)
    trainer = Trainer(config, layout, backend, loader, save, hooks, first_step)
    trainer.done = grouping is not None and grouping.ends(first_step)
    if regrouped is not None:
        trainer.progress.say(regrouped)
    return trainer


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
