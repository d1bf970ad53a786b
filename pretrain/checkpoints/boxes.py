"""Rectangles of an unsharded tensor. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

Ints = tuple[int, ...]
Box = tuple[Ints, Ints]  # a rectangle: its origin and its size


def flat_boxes(shape: Ints, start: int, stop: int) -> Iterator[Box]:
    """The rectangles that the values [start, stop) of a flattened tensor make up, in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the complete rows
    if first > last:  # inside of one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: Ints, index: int, start: int, stop: int) -> Iterator[Box]:
    before = index * prod(shape[1:])
    for offset, size in flat_boxes(shape[1:], start - before, stop - before):
        yield (index, *offset), (1, *size)


def fills(shape: Ints, boxes: Sequence[Box]) -> bool:
    """Whether rectangles fill a tensor of `shape` exactly once: no gap, no overlap, nothing outside."""
    return sum(prod(size) for _, size in boxes) == prod(shape) and _fills(shape, boxes)


def _fills(shape: Ints, boxes: Sequence[Box]) -> bool:
    if not shape:
        return len(boxes) == 1
    edges = sorted({0, shape[0]}.union(*({offset[0], offset[0] + size[0]} for offset, size in boxes)))
    if edges[0] != 0 or edges[-1] != shape[0]:
        return False
    coming = sorted(boxes, key=lambda box: box[0][0], reverse=True)
    here: list[Box] = []  # those that reach over the rows between two neighbouring edges
    for row in edges[:-1]:
        here = [(offset, size) for offset, size in here if offset[0] + size[0] > row]
        while coming and coming[-1][0][0] == row:
            here.append(coming.pop())
        if not _fills(shape[1:], [(offset[1:], size[1:]) for offset, size in here]):
            return False
    return True
