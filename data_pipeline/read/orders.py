"""The index of an epoch: arrays in `index/` that say which tokens its samples have.

Their names, sizes and faults. Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_pipeline.read.manifest import Manifest, manifest_sha256
from data_pipeline.read.pack import VERSION

NAME = re.compile(r"(?P<fingerprint>[0-9a-f]{12})-(?P<split>\w+)-s(?P<length>\d+)-seed(?P<seed>\d+)-epoch(?P<epoch>\d+)")
PACKED = ("document", "start", "first")  # the arrays of best-fit packing
CONCATENATED = ("document_index", "sample_index", "shuffle_index")  # Megatron's, whose names begin with a hash
Places = Callable[[int], list[slice]]  # number of entries → those that are looked at


def fingerprint(folder: str | Path, packing: str) -> str:
    """Another manifest, packing or Megatron version may order samples differently, so it gets its own index."""
    identity = f"{manifest_sha256(folder)} {VERSION if packing == 'best_fit' else _megatron()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


@cache
def _megatron() -> str:
    return version("megatron-core")


@dataclass(frozen=True)
class Wanted:
    """The samples that a run takes of a split: what all their indices have in common."""

    folder: Path
    split: str
    sequence_length: int
    seed: int
    packing: str
    fingerprint: str

    @classmethod
    def of(cls, folder: Path, split: str, sequence_length: int, seed: int, packing: str) -> Wanted:
        """Those of the folder as it is now."""
        return cls(folder, split, sequence_length, seed, packing, fingerprint(folder, packing))

    def place(self, epoch: int) -> Path:
        """The folder of one epoch's index. It may be deleted whenever no run uses it."""
        return self._begin.with_name(f"{self._begin.name}{epoch}")

    def there(self) -> list[Path]:
        """The indices that exist, of any epoch."""
        begin = self._begin
        return sorted(path for path in begin.parent.glob(f"{begin.name}*") if NAME.fullmatch(path.name))

    def bytes(self, manifest: Manifest) -> int:
        """About the size of one index."""
        record = manifest.splits[self.split]
        if self.packing == "best_fit":
            return 16 * (record.documents + record.tokens // self.sequence_length)
        return 4 * record.documents + 12 * record.samples(self.sequence_length)

    @property
    def _begin(self) -> Path:
        name = f"{self.fingerprint}-{self.split}-s{self.sequence_length}-seed{self.seed}-epoch"
        return self.folder / "index" / name


def order_faults(place: Path, lengths: np.ndarray, places: Places) -> Iterator[str]:
    """What is wrong with the index in `place`, of documents of `lengths` tokens, as far as its entries at `places` show.

    OSError if it cannot be read.
    """
    found = NAME.fullmatch(place.name)
    assert found is not None, place
    sequence_length = int(found["length"])
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(place.glob("*.npy")):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            yield f"{path.name} is no array: {error}"
            return
        arrays[path.stem.rpartition("-")[2]] = array
    if arrays.keys() == set(PACKED):
        yield from _packed_faults([arrays[name] for name in PACKED], lengths, sequence_length, places)
    elif arrays.keys() == set(CONCATENATED):
        yield from _concatenated_faults([arrays[name] for name in CONCATENATED], lengths, sequence_length, places)
    else:
        yield f"it has the arrays {', '.join(arrays) or 'none'}"


def _concatenated_faults(
    arrays: Sequence[np.ndarray], lengths: np.ndarray, sequence_length: int, places: Places
) -> Iterator[str]:
    documents, samples, shuffle = arrays
    count = max(0, int(lengths.sum(dtype=np.int64)) - 1) // sequence_length
    shapes = (documents.shape, samples.shape, shuffle.shape)
    if shapes != ((len(lengths),), (count + 1, 2), (count,)):
        yield "its arrays do not fit the documents"
        return
    for name, array in (("document_index.npy", documents), ("shuffle_index.npy", shuffle)):
        if not _takes_once(array, places):
            yield f"its {name} does not take everything once"
            return
    for place in places(len(samples)):
        rows = samples[place].astype(np.int64)
        first, last = int(rows[0, 0]), int(rows[-1, 0])
        inside = 0 <= first <= last < len(documents) and bool((np.diff(rows[:, 0]) >= 0).all())
        if inside:
            taken = lengths[documents[first : last + 1]].astype(np.int64)
            begins = np.cumsum(taken) - taken
            begins = begins[rows[:, 0] - first] + rows[:, 1]
            inside = bool((np.diff(begins) == sequence_length).all()) and (place.start > 0 or not rows[0].any())
        if not inside:
            yield "its sample_index.npy has samples that do not follow each other"
            return


def _packed_faults(arrays: Sequence[np.ndarray], lengths: np.ndarray, sequence_length: int, places: Places) -> Iterator[str]:
    document, start, first = arrays
    pieces = int((-(-lengths.astype(np.int64) // sequence_length)).sum())
    if (document.shape, start.shape, first.ndim) != ((pieces,), (pieces,), 1) or (first[0], first[-1]) != (0, pieces):
        yield "its arrays do not fit the documents"
        return
    taken = []
    for place in places(pieces):
        numbers, starts = document[place].astype(np.int64), start[place].astype(np.int64)
        if int(numbers.min()) < 0 or int(numbers.max()) >= len(lengths):
            yield "its document.npy has numbers of no document"
            return
        if (starts % sequence_length).any() or (starts < 0).any() or (starts >= lengths[numbers]).any():
            yield "its start.npy has places where no piece begins"
            return
        taken.append(numbers * (2**31 // sequence_length + 1) + starts // sequence_length)
    if len(np.unique(np.concatenate(taken))) != sum(map(len, taken)):
        yield "it takes a piece of a document twice"
        return
    for place in places(len(first)):
        bounds = first[place].astype(np.int64)
        inside = int(bounds[0]) >= 0 and int(bounds[-1]) <= pieces and bool((np.diff(bounds) > 0).all())
        if inside and len(bounds) > 1:
            own = slice(int(bounds[0]), int(bounds[-1]))
            filled = np.minimum(lengths[document[own]].astype(np.int64) - start[own], sequence_length)
            inside = int(np.add.reduceat(filled, bounds[:-1] - bounds[0]).max()) <= sequence_length
        if not inside:
            yield "its first.npy has samples that hold more than their length, or nothing"
            return


def _takes_once(order: np.ndarray, places: Places) -> bool:
    """Whether `order` looks like a permutation."""
    seen = np.concatenate([order[place] for place in places(len(order))] or [order])
    inside = seen.size == 0 or (int(seen.min()) >= 0 and int(seen.max()) < len(order))
    return inside and len(np.unique(seen)) == len(seen)
