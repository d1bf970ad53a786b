"""From a configuration to a finished run: build the parts, resume if asked, train."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from configs.durable import write_text
from configs.errors import UserError
from configs.load import flat_fields, to_yaml
from configs.schema import Config
from data_pipeline.dataset import TokenDataset
from data_pipeline.loader import TrainLoader, ValidationLoader
from data_pipeline.manifest import TOKENIZER, manifest_sha256, read_manifest
from pretrain.backends.base import Backend
from pretrain.checkpoint import CheckpointStore, TrainState, read_config
from pretrain.hooks import Checkpoints, Hook, Validation
from pretrain.parallel import (
    TensorAndDataGroups,
    World,
    barrier,
    derived_seed,
    gather_objects,
    prepare_process,
    together,
)
from pretrain.progress import SpokenLog, header
from pretrain.rendezvous import facts, join
from pretrain.trainer import Trainer


def pretrain(config: Config, resume: str) -> bool:
    """Train `config` to its last step; every rank calls it. `resume` is "none", "auto", a run's folder or a checkpoint.

    True: the run is complete; False: it was interrupted and can be resumed. Raises UserError for what the user can mend.
    """
    world = World.from_environment(config.parallel.tensor, config.parallel.pipeline)
    prepare_process(world, config.training.deterministic)
    join(world, facts(config, resume, world.device), config.parallel.timeout_minutes)
    manifest = read_manifest(Path(config.data.path))
    config = config.resolved(manifest.vocab_size, manifest.end_of_document)
    store = CheckpointStore(Path(config.run.folder), world)
    checkpoint = _starting_point(store, resume)
    _make_run_folder(config, store)

    trainer = build_trainer(config, world, store, checkpoint)
    trainer.progress.say(header(config, world, manifest, trainer.first_step))
    if checkpoint is not None:
        for line in (f"resume  {checkpoint} at step {trainer.first_step}", *_changes(read_config(checkpoint), config)):
            trainer.progress.say(line)
    spoken, logger = SpokenLog(trainer.progress), logging.getLogger("model")
    logger.setLevel(logging.INFO)
    logger.addHandler(spoken)
    try:
        complete = trainer.run()
    finally:
        logger.removeHandler(spoken)
    trainer.loader.close()
    if complete:
        trainer.progress.say(f"done    {config.run.folder}: {trainer.step} steps; figures in metrics.jsonl and tensorboard/")
    else:
        trainer.progress.say(f"stopped at step {trainer.step}; go on with --resume=auto")
    barrier()
    torch.distributed.destroy_process_group()
    return complete


def build_trainer(config: Config, world: World, store: CheckpointStore, checkpoint: Path | None) -> Trainer:
    """Model, engine, data and hooks of a resolved config, restored from `checkpoint` when given."""
    training, data, folder = config.training, config.data, Path(config.data.path)
    tokenizer, data_sha256 = (folder / TOKENIZER).read_bytes().decode(), manifest_sha256(folder)
    state = store.check(checkpoint, config, data_sha256, tokenizer) if checkpoint is not None else None
    backend = make_backend(config, world, TensorAndDataGroups(world) if world.tensor_size > 1 else None, checkpoint)
    first_step = state.step if state is not None else 0
    torch.manual_seed(dropout_seed(config, world, first_step))
    if checkpoint is not None and state is not None:
        store.restore(checkpoint, state, backend.load)

    def save(step: int) -> Path:
        saved = store.save(config, TrainState(step, world.size, data_sha256), tokenizer, backend.save)
        store.clear_old(config.checkpoint)
        return saved

    train = TokenDataset(folder, "train", data.sequence_length, config.run.seed)
    valid = TokenDataset(folder, "valid", data.sequence_length)
    micro = training.micro_batch_size
    loader = TrainLoader(train, training.global_batch_size, micro, world.data_rank, world.data_size, steps=training.steps)
    validation = ValidationLoader(valid, config.validation.samples, micro, world.data_rank, world.data_size)
    hooks: list[Hook] = [Validation(validation, config.validation.every_steps), Checkpoints(config.checkpoint.every_steps)]
    return Trainer(config, world, backend, loader, save, hooks, first_step)


def dropout_seed(config: Config, world: World, first_step: int) -> int:
    """For the generators once the model stands: building it draws random numbers, more or fewer by layout.

    Ranks that hold the same hidden states drop the same of them; with sequence parallelism they hold different ones. Only a run
    that goes on with another number of processes keeps what a later `first_step` gives; else the checkpoint has the generators.
    """
    rank = world.rank if config.parallel.sequence else world.pipeline_rank * world.data_size + world.data_rank
    return derived_seed(config.run.seed, f"dropout from step {first_step}" if first_step else "dropout", rank)


def make_backend(config: Config, world: World, groups: TensorAndDataGroups | None, checkpoint: Path | None = None) -> Backend:
    """The engine of a resolved config, with initial weights. Every rank calls it, once torch.distributed is initialised.

    `checkpoint` is what it will load: pipelines are cut as they were then.
    """
    if config.backend == "fsdp":
        from pretrain.backends.fsdp import FSDPBackend

        return FSDPBackend(config, world, groups)
    if config.parallel.pipeline > 1:
        from pretrain.backends.pipeline import PipelineBackend

        return PipelineBackend(config, world, groups, checkpoint)
    from pretrain.backends.deepspeed import DeepSpeedBackend  # only the engine that runs is imported: each takes seconds

    return DeepSpeedBackend(config, world, groups)


def _starting_point(store: CheckpointStore, resume: str) -> Path | None:
    """The checkpoint to start from, decided by the first rank for all."""
    found: Path | None = None

    def decide() -> None:
        nonlocal found
        if resume != "none":
            found = store.find(resume)
        elif store.steps():
            raise UserError(
                f"{store.folder}: holds checkpoints already; pass --resume=auto, or another --run.folder, or delete it"
            )

    together(decide, main_only=True)
    return gather_objects(found)[0]


def _make_run_folder(config: Config, store: CheckpointStore) -> None:
    folder = Path(config.run.folder)

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", to_yaml(config))
        except OSError as error:
            raise UserError(f"run.folder = {config.run.folder!r}: cannot be written ({error.strerror})") from error
        store.clear_remains()

    together(make, main_only=True)


def _changes(then: Config, now: Config) -> list[str]:
    """Fields that differ from those of the checkpoint, a line each."""
    before, after = (dict(flat_fields(config)) for config in (then, now))
    return [f"changed {name}: {before[name]!r} → {value!r}" for name, value in after.items() if before[name] != value]
