"""Which documents are left out because others are equal to them or resemble them, in a bounded amount of memory.

Of documents that are alike the first one in input order stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import methodcaller
from pathlib import Path

import numpy as np

from data_pipeline.prepare.blocks import NAMED, BlockFile, Skips
from data_pipeline.prepare.documents import Copy, Place, Skipped
from data_pipeline.prepare.minhash import PERMUTATIONS, Resemblance

MOST_AT_ONCE = 4_000_000  # hashes that are compared with each other at a time
MOST_OTHERS = 256  # documents that one is compared with at most, the latest of those that it meets
SIGNATURE = PERMUTATIONS * 4  # bytes


class Duplicates:
    """Documents by their number in input order; `kept` is False for those that are left out, which `skips` counts."""

    def __init__(self, blocks: Sequence[BlockFile]) -> None:
        self._blocks = blocks
        self._starts = np.cumsum([0, *(block.read("lengths")[0].size for block in blocks)])
        self.kept = np.ones(self._starts[-1], dtype=bool)
        self.skips = Skips({}, {})

    def kept_of(self, block: int) -> np.ndarray:
        """bool [documents of a block]"""
        return self.kept[self._starts[block] : self._starts[block + 1]]

    def leave_out_equal(self) -> None:
        """Leave out documents whose hash of 128 bits an earlier one has."""
        named: list[tuple[int, int]] = []  # the first copies and their originals
        for numbers, first in self._equals(_digests):
            self.kept[numbers[~first]] = False
            originals = numbers[np.maximum.accumulate(np.where(first, np.arange(first.size), 0))]
            early = np.argsort(numbers[~first])[:NAMED]
            copies = zip(numbers[~first][early].tolist(), originals[~first][early].tolist(), strict=True)
            named = sorted([*named, *copies])[:NAMED]
        self.skips.counts[Skipped.DUPLICATE] = int(self.kept.size - self.kept.sum())
        self.skips.places[Skipped.DUPLICATE] = [self._copy(*pair) for pair in named]

    def leave_out_near(self, resemblance: Resemblance, folder: Path) -> None:
        """Leave out documents that resemble an earlier one which stays. `folder`: where a file of signatures may lie meanwhile.

        Two documents are compared if they have a band of their signatures in common.
        """
        candidates, buckets = self._meetings(resemblance)
        count = 0
        named: list[Place | Copy] = []
        with SignatureFile(folder / "signatures", self._signatures_of(candidates)) as signatures:
            for copy, original, similarity in _resembling(buckets, signatures, resemblance.threshold):
                self.kept[candidates[copy]] = False
                count += 1
                if count <= NAMED:
                    named.append(self._copy(candidates[copy], candidates[original], similarity))
        self.skips.counts[Skipped.NEAR_DUPLICATE] = count
        self.skips.places[Skipped.NEAR_DUPLICATE] = named

    def _meetings(self, resemblance: Resemblance) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the documents that have a band in common with another; for each and each band a bucket, 0 for none."""
        numbers: list[np.ndarray] = []
        buckets: list[np.ndarray] = []
        for band in range(resemblance.bands):
            found: list[tuple[np.ndarray, np.ndarray]] = []
            count = 1
            for number, first in self._equals(methodcaller("read", f"band{band}")):
                shared = ~first
                shared[:-1] |= ~first[1:]  # the first one of several, too
                found.append((number[shared], count + np.cumsum(first[shared], dtype=np.int32) - 1))
                count += int(first[shared].sum())
            numbers.append(np.concatenate([number for number, _ in found]))
            buckets.append(np.concatenate([bucket for _, bucket in found]))
        candidates = np.unique(np.concatenate(numbers))
        table = np.zeros((candidates.size, resemblance.bands), dtype=np.int32)
        for band in range(resemblance.bands):
            table[np.searchsorted(candidates, numbers[band]), band] = buckets[band]
        return candidates, table

    def _equals(self, columns: Callable[[BlockFile], list[np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of the documents that are kept, equal ones together in input order, and which is the first of equal ones.

        `columns` gives of a block the uint64 columns that make a document's hash. They are compared in groups by the remainder
        of the first, so that few are in memory at once.
        """
        if not self.kept.size:
            yield np.empty(0, dtype=np.uint32), np.empty(0, dtype=bool)
            return
        groups = -(-self.kept.size // MOST_AT_ONCE)
        for group in range(groups):
            hashes: list[list[np.ndarray]] = []
            numbers: list[np.ndarray] = []
            for start, block in zip(self._starts.tolist(), self._blocks, strict=False):
                found = columns(block)
                kept = self.kept[start : start + found[0].size]
                chosen = np.flatnonzero((found[0] % np.uint64(groups) == group) & kept)
                hashes.append([column[chosen] for column in found])
                numbers.append((start + chosen).astype(np.uint32))
            joined = [np.concatenate(column) for column in zip(*hashes, strict=True)]
            order = np.lexsort(joined)  # is stable: equal ones stay in input order
            ordered = [column[order] for column in joined]
            first = np.ones(order.size, dtype=bool)
            if order.size:
                first[1:] = np.any([column[1:] != column[:-1] for column in ordered], axis=0)
            yield np.concatenate(numbers)[order], first

    def _signatures_of(self, candidates: np.ndarray) -> Iterator[np.ndarray]:
        for block, (start, stop) in zip(self._blocks, pairwise(self._starts.tolist()), strict=True):
            low, high = np.searchsorted(candidates, [start, stop])
            if high > low:
                yield block.read("signatures")[0][candidates[low:high] - start]

    def _copy(self, number: int, original: int, similarity: float | None = None) -> Copy:
        return Copy(self._place(number), self._place(original), similarity)

    def _place(self, number: int) -> Place:
        block = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._blocks[block].place(int(number - self._starts[block]))


def _digests(block: BlockFile) -> list[np.ndarray]:
    """The two halves of the hashes of documents."""
    return list(block.read("digests")[0].view("<u8").T)


class SignatureFile:
    """Signatures on disk, read one by one."""

    def __init__(self, path: Path, signatures: Iterator[np.ndarray]) -> None:
        self._path = path
        with path.open("wb") as file:
            for part in signatures:
                part.tofile(file)
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> SignatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink()

    def read(self, number: int) -> bytes:
        self._file.seek(number * SIGNATURE)
        return self._file.read(SIGNATURE)


def _resembling(buckets: np.ndarray, signatures: SignatureFile, threshold: float) -> Iterator[tuple[int, int, float]]:
    """Each row of `buckets` whose document resembles that of an earlier row that is none of these; the most similar one of
    these (of equals the first), and how similar the two are.

    A bucket is a chain of the rows that are in it and stay: `heads` has the latest one, and in a row that stays its buckets
    give way to the row before it in each chain.
    """
    heads = [np.full(count + 1, -1, dtype=np.int32) for count in buckets.max(axis=0, initial=0).tolist()]
    for row in range(len(buckets)):
        bands = [(band, bucket) for band, bucket in enumerate(buckets[row].tolist()) if bucket]
        others: set[int] = set()
        for band, bucket in bands:
            other = int(heads[band][bucket])
            while other >= 0 and len(others) < MOST_OTHERS:
                others.add(other)
                other = int(buckets[other, band])
        if others:
            among = sorted(others)
            values = np.frombuffer(b"".join(map(signatures.read, among)), np.uint32).reshape(len(among), PERMUTATIONS)
            equal = (values == np.frombuffer(signatures.read(row), np.uint32)).mean(axis=1)
            best = int(equal.argmax())
            if equal[best] >= threshold:
                yield row, among[best], float(equal[best])
                continue
        for band, bucket in bands:
            buckets[row, band] = heads[band][bucket]
            heads[band][bucket] = row
