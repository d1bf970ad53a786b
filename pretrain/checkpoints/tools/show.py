"""What a checkpoint holds: a list of its tensors, or one tensor's figures, parts and values. Torch-free."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from math import prod

import numpy as np

from configs.errors import UserError
from pretrain.checkpoints.folder import ENGINE_FOLDER
from pretrain.checkpoints.index import StoredTensor, rank_file
from pretrain.checkpoints.storage import Place
from pretrain.checkpoints.tools.tensors import Array, Tensors, figures
from pretrain.checkpoints.tools.words import shape_words, table

MOST_VALUES = 10_000  # of a slice
MOST_PARTS = 50  # in the list of one tensor's


def show_list(folder: Place) -> str:
    """A table of all tensors."""
    entries = sorted(Tensors(folder / ENGINE_FOLDER).index.tensors.items())
    rows = [[key, shape_words(entry.shape), entry.dtype, str(len(entry.parts))] for key, entry in entries]
    values = sum(prod(entry.shape) for _, entry in entries)
    return table(["tensor", "shape", "type", "parts"], rows, right="parts") + f"\n{len(entries)} tensors, {values:,} values"


def show_tensor(folder: Place, key: str, spans: str | None) -> str:
    """A tensor's figures and where its parts lie; its values, too, at `spans` such as 0:2,3:5, if it has any there."""
    tensors = Tensors(folder / ENGINE_FOLDER)
    if key not in tensors.index.tensors:
        near = difflib.get_close_matches(key, tensors.index.tensors, n=1)
        raise UserError(f"{folder}: has no tensor {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    entry = tensors.entry(key)
    where = None if spans is None else _slices(key, entry.shape, spans)
    found = figures(block for _, block in tensors.blocks(key))
    kind, _, name = key.partition("/")
    lines = [
        f"kind   {kind}",
        f"name   {name}",
        f"shape  {shape_words(entry.shape)}",
        f"type   {entry.dtype}",
        f"norm   {found.norm:.9g}",
        f"min    {found.least:.9g}",
        f"max    {found.greatest:.9g}",
        f"mean   {found.mean:.9g}",
        *_parts(entry),
    ]
    if where is not None:
        values = _values(tensors, key, entry.shape, where)
        lines += ["", np.array2string(values, threshold=sys.maxsize, max_line_width=120)]
    return "\n".join(lines)


def _parts(entry: StoredTensor) -> Iterator[str]:
    for number, (rank, offset, size) in enumerate(entry.parts[:MOST_PARTS]):
        box = ", ".join(f"{start}:{start + length}" for start, length in zip(offset, size, strict=True))
        yield f"{'parts' if number == 0 else '':<6} [{box}] in {ENGINE_FOLDER}/{rank_file(rank)}"
    if len(entry.parts) > MOST_PARTS:
        yield f"{'':<6} and {len(entry.parts) - MOST_PARTS:,} more"


def _slices(key: str, shape: tuple[int, ...], text: str) -> list[slice]:
    """Of each dimension; those that `text` leaves out are taken as they are."""
    given = text.split(",")
    if len(given) > len(shape):
        raise UserError(f"--slice {text}: {key} has {len(shape)} dimensions")
    found = []
    for part, length in zip(given, shape, strict=False):
        if not (match := re.fullmatch(r"(-?\d{1,18})|(-?\d{1,18})?:(-?\d{1,18})?", part.strip())):
            raise UserError(f"--slice {text}: {part!r} is neither a number nor START:STOP")
        one, start, stop = (None if group is None else int(group) for group in match.groups())
        if one is not None:
            start, stop = one, one + 1 if one != -1 else None
        found.append(slice(*slice(start, stop).indices(length)[:2]))
    found += [slice(0, length) for length in shape[len(given) :]]
    count = prod(max(0, span.stop - span.start) for span in found)
    if not 0 < count <= MOST_VALUES:
        words = f"{count:,} values of {key}, {shape_words(shape)}; at least 1 and at most {MOST_VALUES:,} are shown"
        raise UserError(f"--slice {text}: {words}")
    return found


def _values(tensors: Tensors, key: str, shape: tuple[int, ...], where: list[slice]) -> Array:
    if not shape:
        return tensors.rows(key, 0, 1)
    return tensors.rows(key, where[0].start, where[0].stop)[(slice(None), *where[1:])]
