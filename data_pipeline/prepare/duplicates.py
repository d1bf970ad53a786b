"""Find equal documents by the hashes of their texts, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from data_pipeline.prepare.blocks import BlockFile

MOST_AT_ONCE = 4_000_000  # hashes that are compared with each other at a time


def first_of_equals(blocks: Sequence[BlockFile]) -> list[np.ndarray]:
    """For each block a bool [documents], False for documents equal to an earlier one.

    Documents are told apart by 128 bits. They are compared in groups by their last bits, so that few are in memory at once.
    """
    kept = [np.ones(block.read("lengths")[0].size, dtype=bool) for block in blocks]
    documents = sum(part.size for part in kept)
    groups = 1
    while documents / groups > MOST_AT_ONCE and groups < 256:
        groups *= 2
    starts = np.cumsum([0, *(part.size for part in kept)])
    flat = np.ones(documents, dtype=bool)
    for group in range(groups):
        hashes: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        for block, start in zip(blocks, starts, strict=False):
            (digests,) = block.read("digests")
            chosen = np.flatnonzero(digests[:, 0] % groups == group)
            hashes.append(digests[chosen].view([("high", "<u8"), ("low", "<u8")]).reshape(-1))
            numbers.append(start + chosen)
        everything, number = np.concatenate(hashes), np.concatenate(numbers)
        _, first = np.unique(everything, return_index=True)
        again = np.ones(everything.size, dtype=bool)
        again[first] = False
        flat[number[again]] = False
    return [flat[start:stop] for start, stop in pairwise(starts)]
