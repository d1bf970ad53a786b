"""Portable checkpoints: whole weights and moments by name in one file, from which a run of any layout goes on.

engine/whole.safetensors    model.NAME, exp_avg.NAME, exp_avg_sq.NAME   float32, NAME as in the unsharded model
                            step                                        AdamW's number of steps, a float32 scalar
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.durable import sync
from configs.errors import UserError
from configs.schema import Config, ModelConfig
from model.build import unsharded_shapes
from model.parallel.sharding import cut
from pretrain.checkpoints.store import ENGINE_FOLDER, WHOLE_FILE, CheckpointStore, TrainState
from pretrain.distributed.layout import Layout

Kind = Literal["model", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
KINDS: tuple[Kind, ...] = ("model", *MOMENTS)


@dataclass(frozen=True)
class WholeState:
    """A model and its optimizer, layout-free: float32 tensors on the CPU by kind and name, and AdamW's number of steps."""

    tensors: Mapping[Kind, Mapping[str, Tensor]]
    step: float


def write_portable(run_folder: Path, config: Config, state: TrainState, tokenizer: str, whole: WholeState) -> Path:
    """Write a portable checkpoint of a run, by one process, with the guarantees of CheckpointStore.save; its folder.

    `config` and `state.world_size` must fit each other, as in any checkpoint. UserError where it cannot be written.
    """
    store = CheckpointStore(run_folder, Layout.from_environment())
    return store.save_portable(config, state, tokenizer, lambda path: _write(path, whole))


def _write(path: Path, whole: WholeState) -> None:
    """Raises OSError."""
    named = {f"{kind}.{name}": tensor for kind, tensors in whole.tensors.items() for name, tensor in tensors.items()}
    step = torch.tensor(whole.step, dtype=torch.float32)
    try:
        save_file({**{name: tensor.float().contiguous() for name, tensor in named.items()}, "step": step}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # it comes readable for its owner only
    sync(path)


class WholeFile:
    """The file of a portable checkpoint as one tensor-parallel rank wants it: shards, read when they are asked for."""

    def __init__(self, folder: Path, config: ModelConfig, tensor_rank: int = 0) -> None:
        """UserError unless it holds just the parameters of `config` and their moments."""
        self.path, self.rank, self.shapes = folder / ENGINE_FOLDER / WHOLE_FILE, tensor_rank, unsharded_shapes(config)
        try:
            self.file: Any = safe_open(self.path, framework="pt", device="cpu")
            found = {name: self.file.get_slice(name) for name in self.file.keys()}  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error
        expected = {f"{kind}.{name}": shape for kind in KINDS for name, shape in self.shapes.items()}
        expected["step"] = torch.Size()
        wrong = [name for name, shape in expected.items() if name not in found or found[name].get_shape() != list(shape)]
        wrong += [name for name in found if name not in expected or found[name].get_dtype() != "F32"]
        if wrong:
            raise UserError(f"{self.path}: does not hold what its config.yaml describes ({wrong[0]})")

    def shard(self, kind: Kind, name: str, shape: torch.Size) -> Tensor:
        """The rank's shard of `shape` of a parameter or moment; it may lie in the file."""
        return cut(self.file.get_tensor(f"{kind}.{name}"), shape, self.rank)

    @property
    def step(self) -> Tensor:
        step: Tensor = self.file.get_tensor("step")
        return step

    def whole_state(self) -> WholeState:
        tensors = {kind: {name: self.shard(kind, name, shape) for name, shape in self.shapes.items()} for kind in KINDS}
        return WholeState(tensors, float(self.step))
