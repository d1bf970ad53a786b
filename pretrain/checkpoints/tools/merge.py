"""An average of several checkpoints' weights as a new run with one checkpoint, tensor by tensor.

The state of the optimizer is left out: it belongs to the weights that it was made with. So no run resumes from an average.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.durable import write_text
from configs.errors import UserError
from configs.load import to_yaml
from configs.schema import Config
from data_pipeline.folder import atomic_folder, check_new_folder
from data_pipeline.prepare.progress import ByteProgress
from data_pipeline.read.manifest import TOKENIZER, FileRecord
from model.tensor_file import Entry, write_tensors
from pretrain.checkpoints.folder import (
    CHECKPOINTS,
    COMMON_FILES,
    CONFIG,
    ENGINE_FOLDER,
    MARKER,
    MergedFrom,
    TrainState,
    read_config,
    read_state,
    read_tokenizer,
    step_folder,
)
from pretrain.checkpoints.index import INDEX, Index, StoredTensor, part_name, rank_file
from pretrain.checkpoints.state import WEIGHTS, NotFiniteError
from pretrain.checkpoints.storage import Place
from pretrain.checkpoints.store import CheckpointStore, write_common, write_state
from pretrain.checkpoints.tools.tensors import Tensors
from pretrain.checkpoints.tools.verify import check_files


def merge(sources: Sequence[Place], weights: Sequence[float], output: Path) -> Path:
    """Write `output`, a new run's folder with the weighted average as its only checkpoint, of the latest step; its folder.

    It is written in float32 from sums in float64. Memory holds one tensor at a time. UserError if the checkpoints are not of
    the same model and tokenizer, one is damaged, or `output` is there already.
    """
    check_new_folder(output)
    for source in sources:
        check_files(source, [*COMMON_FILES, f"{ENGINE_FOLDER}/{INDEX}"])
    config = _common_config(sources)
    stored = [Tensors(source / ENGINE_FOLDER) for source in sources]
    index = _common_index(sources, stored)
    for source, tensors in zip(sources, stored, strict=True):
        ranks = {rank for key in index.tensors for rank, _, _ in tensors.entry(key).parts}
        check_files(source, sorted(f"{ENGINE_FOLDER}/{rank_file(rank)}" for rank in ranks))
    own = config.training.model_copy(update={"average": None})  # of which nothing is left
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(output)}), "training": own})
    state, tokenizer = _state(sources, weights), read_tokenizer(sources[0])
    with (
        atomic_folder(output) as building,
        ByteProgress("merge", sum(tensors.bytes(key) for tensors in stored for key in index.tensors)) as progress,
    ):
        write_text(building / CONFIG, to_yaml(config))
        store = CheckpointStore(building)
        growing = store.make_partial(state.step)
        entries = [
            Entry(
                part_name(key, (0,) * len(entry.shape)),
                torch.float32,
                entry.shape,
                partial(average, stored, weights, key, progress),
            )
            for key, entry in index.tensors.items()
        ]
        file = f"{ENGINE_FOLDER}/{rank_file(0)}"
        files = {file: FileRecord(*write_tensors(growing / file, entries))}
        files |= write_common(growing, config, tokenizer, index) | write_state(growing, state)
        store.put_in_place(state.step, files)
    return step_folder(output / CHECKPOINTS, state.step)


def average(stored: Sequence[Tensors], weights: Sequence[float], key: str, progress: ByteProgress) -> Tensor:
    """A tensor's weighted average. NotFiniteError if it has values that are no numbers."""
    shape = stored[0].index.tensors[key].shape
    total = np.zeros(shape or (1,), np.float64)
    for tensors, weight in zip(stored, weights, strict=True):
        for start, block in tensors.blocks(key):
            values = block.astype(np.float64).reshape(-1, *shape[1:])
            total[start : start + len(values)] += weight * values
            progress.advance(block.nbytes)
    total /= sum(weights)
    if not np.isfinite(total).all():
        raise NotFiniteError(f"{key}: its average is not finite; leave out a checkpoint whose training diverged")
    return torch.from_numpy(total.astype(np.float32).reshape(shape))


def _common_config(sources: Sequence[Place]) -> Config:
    """That of the first. UserError if another's model or tokenizer differs."""
    configs = [read_config(source, checks=()) for source in sources]
    first = configs[0].model.model_dump(exclude={"attention_kernel"})
    for source, config in zip(sources, configs, strict=True):
        model = config.model.model_dump(exclude={"attention_kernel"})
        other = [f"model.{name} {first[name]!r} and {model[name]!r}" for name in first if first[name] != model[name]]
        if other:
            raise UserError(f"{sources[0]} and {source} are not of the same model: {', '.join(other)}")
        if (source / TOKENIZER).read_bytes() != (sources[0] / TOKENIZER).read_bytes():
            raise UserError(f"{sources[0]} and {source} have different tokenizers")
    return configs[0]


def _common_index(sources: Sequence[Place], stored: Sequence[Tensors]) -> Index:
    """Of the weights in one file. UserError if a checkpoint has others than the first."""
    found = [
        {key: (entry.shape, entry.dtype) for key, entry in tensors.index.tensors.items() if key.startswith(f"{WEIGHTS}/")}
        for tensors in stored
    ]
    for source, own in zip(sources, found, strict=True):
        for key in sorted(found[0].keys() | own.keys()):
            if own.get(key) != found[0].get(key) or own[key][1] != "F32":
                raise UserError(f"{sources[0]} and {source} do not both have {key} in float32 and in one shape")
    tensors = {key: StoredTensor(shape, "F32", [(0, (0,) * len(shape), shape)]) for key, (shape, _) in found[0].items()}
    return Index("manyheads-state-1", tensors)


def _state(sources: Sequence[Place], weights: Sequence[float]) -> TrainState:
    states, merged = [read_state(source) for source in sources], []
    for source, state, weight in zip(sources, states, weights, strict=True):
        data = [part.path for part in read_config(source, checks=()).data.parts]
        marker = sha256((source / MARKER).read_bytes()).hexdigest()
        merged.append(MergedFrom(str(source), marker, state.step, weight / sum(weights), data))
    return TrainState(max(state.step for state in states), states[0].world_size, states[0].data_sha256, merged=merged)
