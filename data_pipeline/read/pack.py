"""Best-fit packing: complete documents side by side in samples of one length; only longer documents are split.

The longest piece first, each goes into the fullest sample that has room for it (Ding et al., arXiv 2404.10830). Samples with
the same room are alike. So a plan speaks only of numbers of pieces by length: it takes time by the number of lengths, not of
documents, and holds for every epoch. What an epoch draws is which of the pieces of one length go where.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VERSION = "best_fit 1"  # of the order: a change of it is another number


@dataclass(frozen=True)
class Move:
    """`samples` samples with `room` left take `each` pieces of `length`; samples with all their room left are new."""

    length: int
    room: int
    samples: int
    each: int


@dataclass(frozen=True)
class Pieces:
    """Documents, split into pieces of at most a sample: the document and first token of each, in the order of the text."""

    document: np.ndarray  # int64 [pieces]
    start: np.ndarray  # int64 [pieces], a multiple of the sample's length
    length: np.ndarray  # int64 [pieces]


@dataclass(frozen=True)
class PackedOrder:
    """The samples of one epoch: sample n holds the pieces first[n] ≤ p < first[n + 1]."""

    document: np.ndarray  # int32 [pieces]
    start: np.ndarray  # int32 [pieces]
    first: np.ndarray  # int64 [samples + 1]


def piece_counts(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """How many pieces of each length documents of `lengths` have, int64 [capacity + 1]."""
    counts = np.bincount(lengths % capacity, minlength=capacity + 1).astype(np.int64)
    counts[0], counts[capacity] = 0, int((lengths // capacity).sum())
    return counts


def plan(counts: Sequence[int] | np.ndarray, capacity: int) -> list[Move]:
    """How to pack counts[n] pieces of each length n ≤ capacity into samples of `capacity` tokens."""
    moves, samples_with, rooms = [], [0] * (capacity + 1), 0  # bit r of `rooms` is set if a sample has room r left
    for length in map(int, np.flatnonzero(counts)[::-1]):
        left = int(counts[length])
        while left:
            large = rooms >> length
            room = length + (large & -large).bit_length() - 1 if large else capacity
            each = min(room // length, left)  # once it has taken one, the fullest sample with room is still this one
            samples = left // each
            if large:
                samples = min(samples, samples_with[room])
                samples_with[room] -= samples
                rooms &= ~(int(samples_with[room] == 0) << room)
            moves.append(Move(length, room, samples, each))
            left -= samples * each
            if rest := room - each * length:
                samples_with[rest] += samples
                rooms |= 1 << rest
    return moves


def sample_count(moves: Sequence[Move], capacity: int) -> int:
    """The samples that a plan fills."""
    return sum(move.samples for move in moves if move.room == capacity)


def split_documents(lengths: np.ndarray, capacity: int) -> Pieces:
    """The pieces of documents of `lengths`: complete samples, then what is left."""
    pieces = -(-lengths.astype(np.int64) // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * capacity
    return Pieces(document, start, np.minimum(lengths[document] - start, capacity))


def packed_order(lengths: np.ndarray, capacity: int, moves: Sequence[Move], seed: int) -> PackedOrder:
    """The samples of an epoch, a function of documents and seed. `moves` is the plan of their pieces.

    Drawn by NumPy's RandomState, whose numbers no later version changes.
    """
    draw, pieces = np.random.RandomState(seed), split_documents(lengths, capacity)
    count = len(pieces.document)
    order = draw.permutation(count)
    order = order[np.argsort(-pieces.length[order], kind="stable")]  # the longest first, equal ones in any order
    sample = draw.permutation(sample_count(moves, capacity))[_samples_of(moves, capacity, count)]
    mixed = draw.permutation(count)  # else a sample would begin with its longest piece
    mixed = mixed[np.argsort(sample[mixed], kind="stable")]
    order, sizes = order[mixed], np.bincount(sample)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    return PackedOrder(pieces.document[order].astype(np.int32), pieces.start[order].astype(np.int32), first)


def _samples_of(moves: Sequence[Move], capacity: int, pieces: int) -> np.ndarray:
    """The sample of each piece, int64 [pieces], for pieces from the longest to the shortest."""
    sample_of, placed, samples = np.empty(pieces, np.int64), 0, 0
    waiting: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # samples by the room they have left
    for move in moves:
        if move.room == capacity:
            taken = np.arange(samples, samples + move.samples)
            samples += move.samples
        else:
            taken = _take(waiting[move.room], move.samples)
        sample_of[placed : placed + move.samples * move.each] = np.repeat(taken, move.each)
        placed += move.samples * move.each
        waiting[move.room - move.each * move.length].append(taken)
    assert placed == pieces, "the plan is of other documents"
    return sample_of


def _take(waiting: list[np.ndarray], count: int) -> np.ndarray:
    """Remove `count` samples from the end of a list of arrays of samples."""
    taken = []
    while count:
        last = waiting.pop()
        if len(last) > count:
            waiting.append(last[:-count])
            last = last[-count:]
        taken.append(last)
        count -= len(last)
    return np.concatenate(taken)
