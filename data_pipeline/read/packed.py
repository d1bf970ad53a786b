"""Samples of best-fit packing: how many there are, the index of an epoch on disk, and its samples as tokens. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.schema import DataConfig
from data_pipeline.read.bounds import Bounds
from data_pipeline.read.manifest import read_manifest
from data_pipeline.read.pack import PackedOrder, packed_order, piece_counts, plan, sample_count

if TYPE_CHECKING:
    from data_pipeline.read.token_file import TokenFile

NAMES = ("document", "start", "first")  # of the arrays of an index


def samples_per_epoch(folder: str | Path, data: DataConfig, split: str = "train") -> int:
    """The samples of one epoch of a prepared folder, whose files are sound; without opening its tokens."""
    record = read_manifest(folder).splits[split]
    if data.packing != "best_fit":
        return record.samples(data.sequence_length)
    lengths = Bounds.of(Path(folder) / f"{split}.idx", record.documents).lengths
    return sample_count(plan(piece_counts(lengths, data.sequence_length), data.sequence_length), data.sequence_length)


class Packing:
    """How the documents of a token file are packed, the same in every epoch."""

    def __init__(self, file: TokenFile, sequence_length: int) -> None:
        self._file, self._lengths, self._capacity = file, file.lengths, sequence_length
        self._moves = plan(piece_counts(self._lengths, sequence_length), sequence_length)
        self.samples = sample_count(self._moves, sequence_length)

    def one_pass(self, seed: int, cache: Path) -> PackedEpoch:
        """The samples of one pass. It reads their index from `cache`, or writes it there if there is none.

        ValueError for an index that does not fit.
        """
        if not any(cache.glob("*.npy")):
            order = packed_order(self._lengths, self._capacity, self._moves, seed)
            for name in NAMES:
                np.save(cache / f"{name}.npy", getattr(order, name))
        order = PackedOrder(*(np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES))
        pieces = sum(move.samples * move.each for move in self._moves)
        shapes = (order.document.shape, order.start.shape, order.first.shape)
        if shapes != ((pieces,), (pieces,), (self.samples + 1,)) or order.first[-1] != pieces:
            raise ValueError("its arrays do not fit the documents")
        return PackedEpoch(self._file, self._capacity, order)


class PackedEpoch:
    """The samples of one epoch.

    A sample has one token more than its length, the label of its last token: that of a document that goes on in another sample.
    All else that fills up a sample are ends of documents, after which no label counts.
    """

    def __init__(self, file: TokenFile, sequence_length: int, order: PackedOrder) -> None:
        self._file, self._length, self._order = file, sequence_length, order

    def __len__(self) -> int:
        return len(self._order.first) - 1

    def __getitem__(self, place: int) -> np.ndarray:
        """int64 [sequence_length + 1]."""
        sample, filled = np.full(self._length + 1, self._file.manifest.end_of_document, np.int64), 0
        for piece in range(self._order.first[place], self._order.first[place + 1]):
            room = self._length + 1 if filled == 0 else self._length - filled
            tokens = self._file.document(int(self._order.document[piece]), int(self._order.start[piece]), room)
            sample[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        return sample

    def documents(self, place: int) -> list[int]:
        pieces = self._order.document[self._order.first[place] : self._order.first[place + 1]]
        return [int(document) for document in pieces]
