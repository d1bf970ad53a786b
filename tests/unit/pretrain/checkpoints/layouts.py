"""The same tensors as ranks of several layouts hold them, and write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from configs.load import load_config
from data_pipeline.read.manifest import FileRecord, file_record
from model.parallel.sharding import Spec
from pretrain.checkpoints.files import holding, make_index, write_parts
from pretrain.checkpoints.folder import ENGINE_FOLDER, TrainState
from pretrain.checkpoints.index import INDEX, index_text
from pretrain.checkpoints.state import Block, Part, State
from pretrain.checkpoints.store import CheckpointStore, write_common, write_state
from tests.helpers import write_run

SHAPES: dict[str, tuple[int, ...]] = {"embedding": (11, 6), "up": (8, 5), "down": (5, 8), "norm": (5,), "scale": ()}
PARTITION = {"embedding": Spec(0, 2, padding=1), "up": Spec(0, 2), "down": Spec(1, 2)}
KINDS = ("model", "exp_avg")


def values() -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return {kind: {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} for kind in KINDS}


def rows(tensor: Tensor, ranks: int, rank: int) -> tuple[Tensor, int]:
    """A rank's rows as FSDP shares them, and the number of the first."""
    chunk = -(-len(tensor) // ranks)
    return tensor[rank * chunk : (rank + 1) * chunk].clone(), min(rank * chunk, len(tensor))


def of_rows(tensors: dict[str, dict[str, Tensor]], ranks: int) -> list[State]:
    states = []
    for rank in range(ranks):
        parts: list[Part] = []
        for kind, of_kind in tensors.items():
            for name, tensor in of_kind.items():
                shape = SHAPES[name]
                if shape:
                    own, first = rows(tensor, ranks, rank)
                    block = Block(name, shape, (first, *(0,) * (len(shape) - 1)), tuple(own.shape))
                    parts += block.part(kind, own)
                else:
                    parts += Block(name, shape, (), (), owned=rank == 0).part(kind, tensor.clone())
        states.append(State(parts, {"step": [torch.tensor(7.0)]}))
    return states


def of_zero(tensors: dict[str, dict[str, Tensor]], ranks: int, tensor_ranks: int) -> list[State]:
    """Blocks of tensor-parallel ranks laid end to end, shared out as ZeRO 1 does, the last share filled up."""
    states = []
    for tensor_rank in range(tensor_ranks):
        blocks, flats = {}, {}
        for name, shape in SHAPES.items():
            spec = PARTITION.get(name, Spec()) if tensor_ranks > 1 else Spec()
            origin = spec.origin(torch.Size(shape), tensor_rank)
            own = {kind: spec.shard(tensors[kind][name], tensor_rank) for kind in tensors}
            blocks[name] = Block(name, shape, origin, tuple(own["model"].shape), spec.dim is not None or tensor_rank == 0)
            flats[name] = {kind: block.flatten() for kind, block in own.items()}
        total = sum(flat["model"].numel() for flat in flats.values())
        share = -(-total // ranks)
        for rank in range(ranks):
            parts: list[Part] = []
            begin = 0
            for name, flat in flats.items():
                start = max(rank * share - begin, 0)
                for kind, of_kind in flat.items():
                    own_values = of_kind[start : max(start, (rank + 1) * share - begin)].clone()
                    parts += blocks[name].fragment(kind, own_values, start)
                begin += flat["model"].numel()
            states.append(State(parts, {"step": [torch.tensor(7.0)] * 2}))
    return states


LAYOUTS: dict[str, Callable[[dict[str, dict[str, Tensor]]], list[State]]] = {
    "unsharded": lambda tensors: [State.unsharded(tensors, {"step": torch.tensor(7.0)})],
    "rows on 3": lambda tensors: of_rows(tensors, 3),
    "rows on 7": lambda tensors: of_rows(tensors, 7),
    "zero on 1": lambda tensors: of_zero(tensors, 1, 1),
    "zero on 4": lambda tensors: of_zero(tensors, 4, 1),
    "tensor on 2": lambda tensors: of_zero(tensors, 1, 2),
    "zero on 3, tensor on 2": lambda tensors: of_zero(tensors, 3, 2),
}


def write(engine: Path, states: list[State]) -> Path:
    engine.mkdir(exist_ok=True)
    (engine / INDEX).write_text(index_text(make_index([holding(state) for state in states])))
    for rank, state in enumerate(states):
        path, record = write_parts(engine, rank, [part for part in state.parts if part.owned], {})
        assert record == file_record(path)  # the hash that was taken while it was written
    return engine


def write_checkpoint(run: Path, layout: str, tensors: dict[str, dict[str, Tensor]], *overrides: str, step: int = 3) -> Path:
    """A checkpoint in a run's folder as ranks of one of LAYOUTS write it; its folder."""
    store, states = CheckpointStore(run), LAYOUTS[layout](tensors)
    config = load_config(write_run(run.parent, run.parent / "data", run.name), overrides, world_size=len(states)).resolved(300)
    engine = store.make_partial(step) / ENGINE_FOLDER
    files: dict[str, FileRecord] = {}
    for rank, state in enumerate(states):
        _, files[f"{ENGINE_FOLDER}/rank_{rank:05d}.safetensors"] = write_parts(
            engine, rank, [part for part in state.parts if part.owned], {"rng/cpu": torch.zeros(5, dtype=torch.uint8)}
        )
    files |= write_common(engine.parent, config, "{}", make_index([holding(state) for state in states]))
    files |= write_state(engine.parent, TrainState(step, len(states), "d" * 64, {"step": float(step)}))
    return store.put_in_place(step, files)


def reseal(folder: Path) -> None:
    """Let a checkpoint's marker vouch for the files that are there now."""
    marker = folder / "complete.json"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path != marker}
    content = {name: asdict(file_record(path)) for name, path in files.items()}
    marker.write_text(json.dumps({"format": "manyheads-checkpoint-1", "files": content}))
