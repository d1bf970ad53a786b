"""Whether a checkpoint is what was written: every file's size and hash, every part of every tensor. Torch-free."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from configs.errors import UserError
from configs.words import counted
from data_pipeline.prepare.progress import ByteProgress
from data_pipeline.read.manifest import FileRecord
from pretrain.checkpoints.folder import (
    CONFIG,
    ENGINE_FOLDER,
    MARKER,
    STATE,
    DamagedError,
    Marker,
    TrainState,
    newest_checkpoint,
    other_size,
    read_config,
    read_marker,
    read_state,
)
from pretrain.checkpoints.index import INDEX, Index, part_name, rank_file, read_index
from pretrain.checkpoints.storage import Place, pieces, place, sizes
from pretrain.checkpoints.tools.tensors import read_header
from pretrain.checkpoints.tools.words import size_words

THREADS = min(8, os.cpu_count() or 1)  # that read and hash


def find_checkpoint(text: str) -> Place:
    """The complete checkpoint that a user names: its folder, or that of a run for its newest. UserError if there is none."""
    folder = newest_checkpoint(place(text))
    read_marker(folder)
    return folder


def record_of(file: Place, size: int, advance: Callable[[int], object]) -> FileRecord:
    """Of the first `size` bytes of a file; `advance` is told how many have been read."""
    digest, count = hashlib.sha256(), 0
    for piece in pieces(file, size):
        digest.update(piece)
        count += len(piece)
        advance(len(piece))
    return FileRecord(count, digest.hexdigest())


def verify_all(folder: Place) -> tuple[list[str], str]:
    """All faults of a checkpoint, one line each, and what it holds in a line. UserError for what is no complete checkpoint."""
    marker = read_marker(folder)
    faults = file_faults(folder, marker, list(marker.files))
    more, held = _content_faults(folder, marker, marker.files.keys() - faults.keys())
    total = sum(record.bytes for record in marker.files.values())
    return [*faults.values(), *more], f"{counted(len(marker.files), 'file')}, {size_words(total)}{held}"


def check_files(folder: Place, names: Sequence[str]) -> None:
    """UserError unless these files are what was written."""
    for fault in file_faults(folder, read_marker(folder), names).values():
        raise DamagedError(fault)


def file_faults(folder: Place, marker: Marker, names: Sequence[str]) -> dict[str, str]:
    """What is wrong with the files that differ from the marker in size or content."""
    found = sizes(folder)
    faults = {name: fault for name in names if (fault := _size_fault(folder, marker, name, found))}
    whole = [name for name in names if name not in faults]
    total = sum(marker.files[name].bytes for name in whole)
    with ByteProgress(f"verify {folder.name}", total) as progress, ThreadPoolExecutor(THREADS) as pool:
        try:
            records = pool.map(partial(_record, folder, marker, progress.advance), whole)
            for name, record in zip(whole, records, strict=True):
                if isinstance(record, UserError):
                    faults[name] = str(record)
                elif record != marker.files[name]:
                    faults[name] = f"{folder / name}: its content is not what was written (corrupt)"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: faults[name] for name in names if name in faults}


def _size_fault(folder: Place, marker: Marker, name: str, found: dict[str, int]) -> str | None:
    if name not in found:
        return f"{folder / name}: missing from the checkpoint"
    if found[name] != marker.files[name].bytes:
        return other_size(folder / name, found[name], marker.files[name].bytes)
    return None


def _record(folder: Place, marker: Marker, advance: Callable[[int], object], name: str) -> FileRecord | UserError:
    try:
        return record_of(folder / name, marker.files[name].bytes, advance)
    except UserError as error:
        return error


def _content_faults(folder: Place, marker: Marker, whole: Set[str]) -> tuple[list[str], str]:
    """What is wrong with what the files say that are as they were written, `whole`; what the checkpoint holds."""
    engine = folder / ENGINE_FOLDER
    unknown = [f"{ENGINE_FOLDER}/{name}" for name in sizes(engine) if f"{ENGINE_FOLDER}/{name}" not in marker.files]
    faults = [f"{folder / MARKER}: does not vouch for {name}" for name in unknown]
    if STATE in whole:
        states: list[TrainState] = []
        faults += _failure(lambda: states.append(read_state(folder)))
        for state in states if CONFIG in whole else []:
            faults += _failure(lambda state=state: read_config(folder, state, checks=()))  # type: ignore[misc]
    indices: list[Index] = []
    if f"{ENGINE_FOLDER}/{INDEX}" in whole:
        faults += _failure(lambda: indices.append(read_index(engine)))
    for index in indices:
        faults += _part_faults(engine, index, marker, whole)
        parts = sum(len(entry.parts) for entry in index.tensors.values())
        return faults, f", {counted(len(index.tensors), 'tensor')} in {counted(parts, 'part')}"
    return faults, ""


def _part_faults(engine: Place, index: Index, marker: Marker, whole: Set[str]) -> Iterator[str]:
    """Parts that a rank's file lacks, has otherwise, or has besides; of files that are as they were written."""
    expected: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for key, entry in index.tensors.items():
        for rank, offset, size in entry.parts:
            expected.setdefault(rank, {})[part_name(key, offset)] = (entry.dtype, size)
    written = {name.rpartition("/")[2] for name in marker.files if name.startswith(f"{ENGINE_FOLDER}/rank_")}
    ranks = {rank_file(rank): wanted for rank, wanted in expected.items()}
    for name in sorted(written | ranks.keys()):
        path, wanted = engine / name, ranks.get(name, {})
        if name not in written:
            are = "is" if len(wanted) == 1 else "are"
            yield f"{engine / INDEX}: {counted(len(wanted), 'part')} {are} in {name}, for which {MARKER} does not vouch"
            continue
        if f"{ENGINE_FOLDER}/{name}" not in whole:
            continue
        try:
            spans = read_header(path).spans
        except UserError as error:
            yield str(error)
            continue
        found = {part: (span.dtype, span.shape) for part, span in spans.items() if "@" in part}
        for part in sorted(wanted.keys() | found.keys()):
            if found.get(part) != wanted.get(part):
                yield f"{path}: {part!r} is {_words(found.get(part))} there, {_words(wanted.get(part))} in {INDEX}"


def _words(part: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if part is None else f"{part[0]} {list(part[1])}"


def _failure(read: Callable[[], object]) -> list[str]:
    try:
        read()
    except UserError as error:
        return [" ".join(str(error).split())]
    return []
