"""Sharded checkpoints in the files of torch.distributed.checkpoint: tensors only, read without unpickling, on any layout.

    engine/mp_rank_00/.metadata         name, shape and place of every tensor that tensor-parallel rank 0 holds a shard of
                      __0_0.distcp      what data-parallel rank 0 wrote of them
                      __1_0.distcp      …

`.metadata` is a pickle. Here plain records are read from it, of the few classes that such a file names; none of those classes
is called. The tensors are read with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from configs.durable import sync
from configs.errors import UserError
from model.parallel.sharding import join

INDEX = ".metadata"
WEIGHTS = "model."  # before the name of a parameter
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")
_CONSTANTS = {("torch", "Size"): torch.Size, ("torch", "float32"): torch.float32}
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}  # not BytesStorageMetadata, whose content is a pickle too


def shard_folder(engine: Path, tensor_rank: int) -> Path:
    """Where the data-parallel ranks of a tensor-parallel rank write."""
    return engine / f"mp_rank_{tensor_rank:02d}"


def write(folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None) -> list[Path]:
    """Write this rank's part of `state`, synced to disk; all ranks of `group` call it. The files that this rank wrote.

    Raises OSError on every rank of the group when one could not write, once all have come through.
    """
    try:
        dcp.save(dict(state), storage_writer=_Writer(folder), process_group=group)
    except CheckpointException as error:
        raise OSError(_reason(error)) from error
    sync(folder)
    rank = dist.get_rank(group)
    return [*sorted(folder.glob(f"__{rank}_*.distcp")), *([folder / INDEX] if rank == 0 else [])]


def read(folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state` in place, each rank its own part, however the checkpoint was cut; all of `group` call it.

    Raises UserError on every rank of the group for files that do not hold just these tensors.
    """
    _load(folder, state, {"process_group": group})


def load_whole(engine: Path, tensor_size: int, shapes: Mapping[str, torch.Size], prefix: str = WEIGHTS) -> dict[str, Tensor]:
    """The parameters of `shapes` whole, on the CPU, joined from the shards of all tensor-parallel ranks, without any group.

    With the `prefix` of a moment, that of theirs. Raises UserError for files that do not hold them.
    """
    whole = WholeParameters(engine, tensor_size, shapes, prefix)
    return {name: whole(name) for name in shapes}


class WholeParameters:
    """The parameters of `shapes` by name, or a moment of theirs, each read and joined when it is asked for."""

    def __init__(self, engine: Path, tensor_size: int, shapes: Mapping[str, torch.Size], prefix: str = WEIGHTS) -> None:
        """UserError unless the files hold just these."""
        self.engine, self.shapes, self.prefix = engine, shapes, prefix
        self.indices = {}
        for rank in range(tensor_size):
            folder = shard_folder(engine, rank)
            self.indices[folder] = _checked_index(folder, shapes, prefix)

    def __call__(self, name: str) -> Tensor:
        shards = []
        for folder, index in self.indices.items():
            entry: Any = index.state_dict_metadata[self.prefix + name]
            shards.append(torch.full(entry.size, torch.nan))
            _load(folder, {self.prefix + name: shards[-1]}, {"no_dist": True}, index)
        try:
            return join(shards, self.shapes[name])
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.engine}: its shards do not fit the model ({error})") from error


def load_step(engine: Path) -> Tensor:
    """How often AdamW has stepped."""
    state = {"step": torch.full((), torch.nan)}
    _load(shard_folder(engine, 0), state, {"no_dist": True})
    return state["step"]


def weight_files(engine: Path, tensor_size: int) -> list[Path]:
    """The files from which `load_whole` reads weights. UserError where an index is missing or not ours."""
    paths: set[Path] = set()
    for rank in range(tensor_size):
        folder = shard_folder(engine, rank)
        places = read_index(folder / INDEX).storage_data
        paths |= {folder / INDEX}
        paths |= {folder / place.relative_path for index, place in places.items() if index.fqn.startswith(WEIGHTS)}
    return sorted(paths)


def read_index(path: Path) -> Metadata:
    """What a `.metadata` file says, checked; raises UserError for anything that `write` does not put there."""
    try:
        with path.open("rb") as file:
            return _checked(_Unpickler(file).load())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the many that damaged pickles raise
        raise UserError(f"{path}: is no index of a checkpoint ({error or type(error).__name__})") from error


class _Record:
    """Stands for an object in a pickle: only what was written as its state, whatever its class would have made of it."""

    def __init__(self, *arguments: object) -> None:
        self.fields: Any = None

    def __setstate__(self, state: object) -> None:
        self.fields = state


class _Unpickler(pickle.Unpickler):
    """Makes a `_Record` of a class of its own for each class named; a pickle may write to what it is given."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONSTANTS:
            return _CONSTANTS[module, name]
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _checked(index: _Record) -> Metadata:
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, place in index.fields["storage_data"].items():
        fields = place.fields
        if not _DATA_FILE.fullmatch(fields["relative_path"]) or fields.get("transform_descriptors"):
            raise ValueError(f"it points to {fields['relative_path']!r}")
        start, length = _lengths([fields["offset"], fields["length"]])
        key = MetadataIndex(str(key.fields["fqn"]), _lengths(key.fields["offset"]), key.fields["index"])
        places[key] = _StorageInfo(fields["relative_path"], start, length)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        str(name): _tensor(str(name), entry, places) for name, entry in index.fields["state_dict_metadata"].items()
    }
    return Metadata(tensors, storage_data=places)


def _tensor(name: str, entry: _Record, places: Mapping[MetadataIndex, _StorageInfo]) -> TensorStorageMetadata:
    if entry.fields["properties"].fields[0] is not torch.float32:
        raise ValueError(f"{name} is not float32")
    size = _lengths(entry.fields["size"])
    chunks = [_chunk(chunk, size) for chunk in entry.fields["chunks"]]
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError(f"parts of {name} are missing")
    if any(MetadataIndex(name, chunk.offsets) not in places for chunk in chunks):
        raise ValueError(f"it has no place for parts of {name}")
    return TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)


def _chunk(chunk: _Record, size: torch.Size) -> ChunkStorageMetadata:
    offsets, sizes = _lengths(chunk.fields["offsets"]), _lengths(chunk.fields["sizes"])
    if any(offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)):
        raise ValueError("a part lies outside its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _lengths(numbers: Any) -> torch.Size:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{numbers!r} are no lengths")
    return torch.Size(numbers)


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        """Without the path, which is another once the checkpoint is complete."""
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, shapes: Mapping[str, torch.Size], index: Metadata | None) -> None:
        super().__init__(folder)
        self.folder, self.shapes, self.index = folder, shapes, index

    def read_metadata(self) -> Metadata:
        """Takes no arguments, so that DCP does not ask for a second file where this one cannot be read."""
        index = self.index or read_index(self.folder / INDEX)
        for name, shape in self.shapes.items():
            entry: Any = index.state_dict_metadata.get(name)
            if entry is None:
                raise UserError(f"{self.folder / INDEX}: holds no {name}")
            if entry.size != shape:
                raise UserError(f"{self.folder / INDEX}: {name} has shape {tuple(entry.size)}, not {tuple(shape)}")
        return index


def _load(folder: Path, state: dict[str, Tensor], where: dict[str, Any], index: Metadata | None = None) -> None:
    reader = _Reader(folder, {name: tensor.shape for name, tensor in state.items()}, index)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no group
            dcp.load(dict(state), storage_reader=reader, **where)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, UserError):
            raise failure from error
        raise UserError(f"{folder}: cannot be read ({_reason(error)})") from error


def _checked_index(folder: Path, shapes: Mapping[str, torch.Size], prefix: str) -> Metadata:
    """The index of one tensor-parallel rank's shards of the parameters, or of a moment of theirs."""
    index = read_index(folder / INDEX)
    found: dict[str, Any] = index.state_dict_metadata
    own = {name: entry.size for name, entry in found.items() if name.startswith(prefix)}
    expected = {prefix + name: shape for name, shape in shapes.items()}
    if own.keys() != expected.keys() or any(own[name].numel() > shape.numel() for name, shape in expected.items()):
        raise UserError(f"{folder / INDEX}: holds other parameters than the model has")
    return index


def _reason(error: CheckpointException) -> str:
    """The first rank's failure, in one line."""
    failure = next(iter(error.failures.values()))[0]
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]
