"""The weights of a checkpoint of any layout, whole, on the CPU and without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from model.sharding import join, whole_shapes
from pretrain.backends import fsdp_files, zero_shards
from pretrain.checkpoint import ENGINE_FOLDER, load_tensors, read_config


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights by name. UserError where its files do not hold them."""
    config, engine = read_config(folder), folder / ENGINE_FOLDER
    shapes = whole_shapes(config.model)
    if config.backend == "fsdp":
        return fsdp_files.load_weights(engine, config.parallel.tensor, shapes)
    try:
        shards = [_load_shard(engine, config, rank) for rank in range(config.parallel.tensor)]
        if any(shard.keys() != shapes.keys() for shard in shards):
            raise ValueError("they hold other parameters")
        return {name: join([shard[name] for shard in shards], shape) for name, shape in shapes.items()}
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{folder}: its shards do not fit its config.yaml ({error})") from error


def weight_files(folder: Path) -> list[str]:
    """The files that `load_weights` reads, relative to the checkpoint."""
    config, engine = read_config(folder), folder / ENGINE_FOLDER
    if config.backend == "fsdp":
        paths = fsdp_files.weight_files(engine, config.parallel.tensor)
    else:
        paths = [path for rank in range(config.parallel.tensor) for path in _shard_files(engine, config, rank)]
    return [str(path.relative_to(folder)) for path in paths]


def _shard_files(engine: Path, config: Config, rank: int) -> list[Path]:
    """Files with the weights of tensor-parallel rank `rank`, in DeepSpeed's format."""
    if config.parallel.pipeline > 1:
        tied = config.model.tie_embeddings  # the output layer is the first, then
        return [engine / f"layer_{n:02d}-model_{rank:02d}-model_states.pt" for n in range(config.model.num_layers + 4 - tied)]
    if config.parallel.zero_stage == 3:
        return [_shapes_file(engine, rank), *zero_shards.state_files(engine, rank)]
    return [engine / f"mp_rank_{rank:02d}_model_states.pt"]


def _shapes_file(engine: Path, rank: int) -> Path:
    return engine / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt"


def _load_shard(engine: Path, config: Config, rank: int) -> dict[str, Tensor]:
    if config.parallel.pipeline > 1:
        layers = [_of_names(path, load_tensors(path)) for path in _shard_files(engine, config, rank)]
        return {name: value for layer in layers for name, value in layer.items()}
    from pretrain.backends.deepspeed import SAFE_CLASSES  # slow to import

    if config.parallel.zero_stage == 3:
        path = _shapes_file(engine, rank)
        content = load_tensors(path, SAFE_CLASSES)
        shapes = content.get("param_shapes") if isinstance(content, dict) else None
        if not isinstance(shapes, list):
            raise UserError(f"{path}: holds no shapes of parameters")
        return zero_shards.whole_weights(zero_shards.StateFiles(engine, rank, SAFE_CLASSES), shapes)
    (path,) = _shard_files(engine, config, rank)
    content = load_tensors(path)
    return _of_names(path, content.get("module") if isinstance(content, dict) else None)


def _of_names(path: Path, weights: object) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping) or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError(f"{path}: holds no model")
    return dict(weights)
