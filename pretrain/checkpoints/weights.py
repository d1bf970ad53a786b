"""The weights of a checkpoint of any layout, and AdamW's state beside them, whole, on the CPU and without an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from model.build import model_row, unsharded_shapes
from model.parallel.pipeline import layer_files, row_bounds, stage_name, tied_modules, unsharded_name
from model.parallel.sharding import join
from pretrain.checkpoints import fsdp as fsdp_files
from pretrain.checkpoints import zero as zero_shards
from pretrain.checkpoints.portable import KINDS, MOMENTS, Kind, WholeFile, WholeState
from pretrain.checkpoints.stages import read_weights
from pretrain.checkpoints.store import ENGINE_FOLDER, WHOLE_FILE, is_portable, load_tensors, read_config
from pretrain.optim.registry import optimizer_recipe


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights by name. UserError where its files do not hold them."""
    weights = Weights(folder)
    return {name: weights(name) for name in weights.shapes}


class Weights:
    """The model's weights by name, each read and made whole when it is asked for; it may lie in the file."""

    def __init__(self, folder: Path) -> None:
        """UserError where the files do not hold the parameters of its config.yaml."""
        config, engine = read_config(folder), folder / ENGINE_FOLDER
        self.folder, self.shapes = folder, unsharded_shapes(config.model)
        self._whole: Callable[[str], Tensor] | None = None
        self._shards: list[Callable[[str], Tensor]] = []
        if is_portable(folder):
            file = WholeFile(folder, config.model)
            self._whole = lambda name: file.shard("model", name, self.shapes[name])
        elif config.backend == "fsdp":
            self._whole = fsdp_files.WholeParameters(engine, config.parallel.tensor, self.shapes)
        else:
            for rank in range(config.parallel.tensor):
                names, shard = _shard(engine, config, rank)
                _check_names(folder, names, self.shapes)
                self._shards.append(shard)

    def __call__(self, name: str) -> Tensor:
        if self._whole is not None:
            return self._whole(name)
        shards = [shard(name).detach() for shard in self._shards]  # masters of ZeRO are written as parameters
        return _join_shards(self.folder, shards, self.shapes[name])


def load_state(folder: Path) -> WholeState:
    """Weights as the optimizer has them (fp32, also of a run in bf16) and its moments. UserError for files without them."""
    config, engine = read_config(folder), folder / ENGINE_FOLDER
    tensor = config.parallel.tensor
    if is_portable(folder):
        return WholeFile(folder, config.model).whole_state()
    if config.backend == "fsdp":
        shapes = unsharded_shapes(config.model)
        whole = {kind: fsdp_files.load_whole(engine, tensor, shapes, f"{kind}.") for kind in KINDS}
        return WholeState(whole, float(fsdp_files.load_step(engine)))
    shards: list[dict[Kind, dict[str, Tensor]]] = [{kind: {} for kind in KINDS} for _ in range(tensor)]
    steps: set[float] = set()
    for stage in reversed(range(config.parallel.pipeline)):  # tied weights are those of the first stage
        for rank in range(tensor):
            part = _load_part(engine, config, stage, rank)
            steps.add(part.step)
            for kind in KINDS:
                shards[rank][kind] |= part.tensors[kind]
    if len(steps) > 1:
        raise UserError(f"{folder}: its parameters have not all stepped equally often ({sorted(steps)})")
    return WholeState({kind: _joined(folder, config, [shard[kind] for shard in shards]) for kind in KINDS}, steps.pop())


def weight_files(folder: Path) -> list[str]:
    """The files that `load_weights` reads, relative to the checkpoint."""
    config, engine = read_config(folder), folder / ENGINE_FOLDER
    if is_portable(folder):
        paths = [engine / WHOLE_FILE]
    elif config.backend == "fsdp":
        paths = fsdp_files.weight_files(engine, config.parallel.tensor)
    else:
        paths = [path for rank in range(config.parallel.tensor) for path in _shard_files(engine, config, rank)]
    return [str(path.relative_to(folder)) for path in paths]


def _joined(folder: Path, config: Config, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from those of all tensor-parallel ranks."""
    shapes = unsharded_shapes(config.model)
    for shard in shards:
        _check_names(folder, shard.keys(), shapes)
    return {name: _join_shards(folder, [shard[name] for shard in shards], shape) for name, shape in shapes.items()}


def _check_names(folder: Path, names: Set[str], shapes: Mapping[str, torch.Size]) -> None:
    if names != shapes.keys():
        raise UserError(f"{folder}: its shards do not fit its config.yaml (they hold other parameters)")


def _join_shards(folder: Path, shards: list[Tensor], shape: torch.Size) -> Tensor:
    try:
        return join(shards, shape)
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{folder}: its shards do not fit its config.yaml ({error})") from error


def _load_part(engine: Path, config: Config, stage: int, rank: int) -> WholeState:
    """What a tensor-parallel rank of a pipeline stage has, in DeepSpeed's format."""
    from pretrain.backends.deepspeed import SAFE_CLASSES  # slow to import

    model_rank, zero_stage = stage * config.parallel.tensor + rank, config.parallel.zero_stage
    name_of = unsharded_name if config.parallel.pipeline > 1 else str
    try:
        if zero_stage == 0:
            return _load_plain(engine, config, stage, rank)
        states = zero_shards.StateFiles(engine, model_rank, SAFE_CLASSES)
        groups = [
            {name_of(name): shape for name, shape in group.items()} for group in _param_shapes(engine, zero_stage, model_rank)
        ]
        tensors = {kind: zero_shards.whole_tensors(states, groups, zero_stage, kind) for kind in KINDS}
        (step,) = {float(group["step"]) for group in states.groups(0)}
        return WholeState(tensors, step)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{engine}: its optimizer states do not fit its config.yaml ({error})") from error


def _load_plain(engine: Path, config: Config, stage: int, rank: int) -> WholeState:
    """Stage 0 of ZeRO: the state dict of the optimizer, whose parameters have numbers in its order. ValueError for others."""
    path = _model_file(engine, stage * config.parallel.tensor + rank)
    state: dict[str, Any] = load_tensors(path, mapped=True)["optimizer"]
    weights, names = _of_stage(engine, config, stage, rank)
    dimensions = {name: weight.dim() for name, weight in weights.items()}
    groups = optimizer_recipe(config.optimizer.kind).groups(dimensions, config.optimizer)
    order = [name for group in groups for name in group.names]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group.names) for group in groups]:
        raise ValueError(f"{path.name} has other groups of parameters")
    moments = [state["state"][number] for number in range(len(order))]
    if any(moments[i][kind].shape != weights[name].shape for i, name in enumerate(order) for kind in MOMENTS):
        raise ValueError(f"{path.name} has moments of other shapes")
    tensors: dict[Kind, dict[str, Tensor]] = {"model": {names[name]: weights[name] for name in order}}
    tensors |= {kind: {names[name]: moments[i][kind] for i, name in enumerate(order)} for kind in MOMENTS}
    (step,) = {float(moment["step"]) for moment in moments}
    return WholeState(tensors, step)


def _of_stage(engine: Path, config: Config, stage: int, rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights under their names in the engine's module, and those their unsharded names."""
    if config.parallel.pipeline == 1:
        weights = _of_model_file(engine, rank)
        return weights, {name: name for name in weights}
    row = model_row(config.model)
    bounds = row_bounds(row, read_weights(engine, len(row)), config.parallel.pipeline)
    files, tied = layer_files(row), tied_modules(row)
    weights, names = {}, {}
    for number in range(bounds[stage], bounds[stage + 1]):
        path = _layer_file(engine, files[number], rank)
        for name, weight in _of_names(path, load_tensors(path, mapped=True)).items():
            name_there = stage_name(number, tied.get(number), name)
            weights[name_there], names[name_there] = weight, name
    return weights, names


def _param_shapes(engine: Path, zero_stage: int, model_rank: int) -> list[Mapping[str, torch.Size]]:
    """Names and shapes of a rank's parameters, a mapping for each of the optimizer's groups, in their order."""
    from pretrain.backends.deepspeed import SAFE_CLASSES  # slow to import

    path = _shapes_file(engine, model_rank) if zero_stage == 3 else _model_file(engine, model_rank)
    content = load_tensors(path, SAFE_CLASSES, mapped=True)
    shapes = content.get("param_shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        raise UserError(f"{path}: holds no shapes of parameters")
    return shapes


def _shard_files(engine: Path, config: Config, rank: int) -> list[Path]:
    """Files with the weights of tensor-parallel rank `rank`, in DeepSpeed's format."""
    if config.parallel.pipeline > 1:
        numbers = sorted({*layer_files(model_row(config.model))})
        return [_layer_file(engine, number, rank) for number in numbers]
    if config.parallel.zero_stage == 3:
        return [_shapes_file(engine, rank), *zero_shards.state_files(engine, rank)]
    return [_model_file(engine, rank)]


def _layer_file(engine: Path, number: int, rank: int) -> Path:
    return engine / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def _model_file(engine: Path, model_rank: int) -> Path:
    return engine / f"mp_rank_{model_rank:02d}_model_states.pt"


def _shapes_file(engine: Path, model_rank: int) -> Path:
    return engine / f"zero_pp_rank_0_mp_rank_{model_rank:02d}_model_states.pt"


def _shard(engine: Path, config: Config, rank: int) -> tuple[Set[str], Callable[[str], Tensor]]:
    """The names of parameters in DeepSpeed's files, and what gives a tensor-parallel rank's shard of one."""
    if config.parallel.pipeline > 1:
        layers = [_of_names(path, load_tensors(path, mapped=True)) for path in _shard_files(engine, config, rank)]
        weights = {name: value for layer in layers for name, value in layer.items()}
        return weights.keys(), weights.__getitem__
    if config.parallel.zero_stage < 3:
        weights = _of_model_file(engine, rank)
        return weights.keys(), weights.__getitem__
    from pretrain.backends.deepspeed import SAFE_CLASSES  # slow to import

    whole = zero_shards.WholeParameters(zero_shards.StateFiles(engine, rank, SAFE_CLASSES), _param_shapes(engine, 3, rank))

    def read(name: str) -> Tensor:
        try:
            return whole(name)
        except (ValueError, IndexError) as error:
            raise UserError(f"{engine}: its shards do not fit its config.yaml ({error})") from error

    return whole.places.keys(), read


def _of_model_file(engine: Path, model_rank: int) -> dict[str, Tensor]:
    path = _model_file(engine, model_rank)
    content = load_tensors(path, mapped=True)
    return _of_names(path, content.get("module") if isinstance(content, dict) else None)


def _of_names(path: Path, weights: object) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping) or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError(f"{path}: holds no model")
    return dict(weights)
