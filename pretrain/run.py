"""From a configuration to a finished run: build the parts, resume if asked, train."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import to_yaml
from configs.schema import Config
from data_pipeline.dataset import TokenDataset
from data_pipeline.loader import TrainLoader, ValidationLoader
from data_pipeline.manifest import TOKENIZER, read_manifest
from model.initialization import init_weights
from model.transformer import DecoderLM
from pretrain.backends.deepspeed import DeepSpeedBackend, initialize_distributed
from pretrain.checkpoint import CheckpointStore, write_text
from pretrain.hooks import Checkpoints, Hook, Validation
from pretrain.parallel import World, barrier, gather_objects, prepare_process
from pretrain.progress import header
from pretrain.trainer import Trainer


def pretrain(config: Config, resume: str) -> None:
    """Train `config` to its last step; every rank calls it. `resume` is "none", "auto" or a checkpoint folder.

    Raises UserError on every rank for what the user can mend.
    """
    world = World.from_environment()
    prepare_process(world, config.training.deterministic)
    initialize_distributed()
    manifest = read_manifest(Path(config.data.path))
    config = config.resolved(manifest.vocab_size)
    store = CheckpointStore(Path(config.run.folder), world)
    checkpoint = _starting_point(store, resume)
    if world.is_main:
        _make_run_folder(config)

    trainer = build_trainer(config, world, store, checkpoint)
    trainer.progress.say(header(config, trainer.backend.module, world, manifest, trainer.first_step))
    if checkpoint is not None:
        trainer.progress.say(f"resume  {checkpoint} at step {trainer.first_step}")
    complete = trainer.run()
    trainer.loader.close()
    if complete:
        trainer.progress.say(f"done    {config.run.folder}: {trainer.step} steps; TensorBoard: {config.run.folder}/tensorboard")
    else:
        trainer.progress.say(f"stopped at step {trainer.step}; go on with --resume=auto")
    barrier()
    torch.distributed.destroy_process_group()


def build_trainer(config: Config, world: World, store: CheckpointStore, checkpoint: Path | None) -> Trainer:
    """Model, engine, data and hooks of a resolved config, restored from `checkpoint` when given."""
    torch.manual_seed(config.run.seed + world.rank)  # dropout differs between ranks; initial weights have their own seeds
    module = DecoderLM(config.model, recompute_activations=config.training.recompute_activations)
    init_weights(module, config.run.seed)
    backend = DeepSpeedBackend(config, module, world)
    tokenizer = Path(config.data.path) / TOKENIZER
    first_step = 0 if checkpoint is None else store.restore(checkpoint, config, tokenizer, backend.load).step

    training, data = config.training, config.data
    train = TokenDataset(Path(data.path), "train", data.sequence_length, config.run.seed)
    valid = TokenDataset(Path(data.path), "valid", data.sequence_length)
    loader = TrainLoader(train, training.global_batch_size, training.micro_batch_size, world.rank, world.size)
    validation = ValidationLoader(valid, config.validation.samples, training.micro_batch_size, world.rank, world.size)
    hooks: list[Hook] = [Validation(validation, config.validation.every_steps), Checkpoints(config.checkpoint.every_steps)]
    return Trainer(config, world, backend, loader, store, hooks, first_step)


def _starting_point(store: CheckpointStore, resume: str) -> Path | None:
    """The checkpoint to start from, decided by the first rank for all."""
    if resume != "none":
        return gather_objects(store.find(resume))[0]
    if any(gather_objects(bool(store.steps()))):
        raise UserError(f"{store.folder}: holds checkpoints already; pass --resume=auto, or another --run.folder, or delete it")
    return None


def _make_run_folder(config: Config) -> None:
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(f"run.folder = {config.run.folder!r}: cannot be written ({error.strerror})") from error
