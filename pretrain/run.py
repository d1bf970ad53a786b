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
from model.initialization import init_weights
from model.transformer import DecoderLM
from pretrain.backends.deepspeed import DeepSpeedBackend, initialize_distributed
from pretrain.checkpoint import CheckpointStore, TrainState, read_config
from pretrain.hooks import Checkpoints, Hook, Validation
from pretrain.parallel import (
    TensorAndDataGroups,
    World,
    barrier,
    derived_seed,
    gather_objects,
    make_layers,
    prepare_process,
    together,
)
from pretrain.progress import SpokenLog, header
from pretrain.trainer import Trainer


def pretrain(config: Config, resume: str) -> bool:
    """Train `config` to its last step; every rank calls it. `resume` is "none", "auto", a run's folder or a checkpoint.

    True: the run is complete; False: it was interrupted and can be resumed. Raises UserError for what the user can mend.
    """
    world = World.from_environment(config.parallel.tensor)
    prepare_process(world, config.training.deterministic)
    initialize_distributed()
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
    groups = TensorAndDataGroups(world) if world.tensor_size > 1 else None
    module = DecoderLM(config.model, make_layers(config, groups), training.recompute_activations)
    init_weights(module, config.run.seed)
    backend = DeepSpeedBackend(config, module, world, groups)
    # Ranks that hold the same hidden states drop the same of them; with sequence parallelism they hold different ones. Seeded
    # once the model stands, since building draws random numbers, more or fewer by layout.
    dropout_rank = world.rank if config.parallel.sequence else world.data_rank
    torch.manual_seed(derived_seed(config.run.seed, "dropout", dropout_rank))
    first_step = 0
    if checkpoint is not None:
        first_step = store.restore(checkpoint, config, data_sha256, tokenizer, backend.load).step

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
