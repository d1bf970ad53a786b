"""Token files in Megatron's indexed format, written in a bounded amount of memory and without Megatron.

Megatron's own writer keeps Python lists of all documents, about 100 bytes for each; this one keeps 4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.read.bounds import index_header

_CHUNK = 1 << 20  # documents


def smallest_dtype(vocab_size: int) -> str:
    """The type that Megatron chooses for a vocabulary."""
    return "uint16" if vocab_size < 65500 else "int32"


class TokenWriter:
    """Writes `name`.bin as documents come, and `name`.idx at the end."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._bin = (folder / f"{name}.bin").open("wb")

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Append documents of `lengths` ids each."""
        if lengths.size == 0:
            return
        ids.astype(self._dtype, copy=False).tofile(self._bin)
        self._lengths.append(lengths.astype(np.int32, copy=False))
        self.documents += lengths.size
        self.tokens += ids.size
        self.text_bytes += text_bytes

    def close(self) -> None:
        self._bin.close()

    def finish(self) -> None:
        self.close()
        with (self._folder / f"{self._name}.idx").open("wb") as file:
            file.write(index_header(self._dtype.name, self.documents))
            for lengths in self._lengths:
                lengths.tofile(file)
            start = 0
            for lengths in self._lengths:  # where each document begins in the .bin
                ends = start + np.cumsum(lengths, dtype=np.int64)
                ((ends - lengths) * self._dtype.itemsize).tofile(file)
                start = int(ends[-1])
            for first in range(0, self.documents + 1, _CHUNK):
                np.arange(first, min(first + _CHUNK, self.documents + 1), dtype=np.int64).tofile(file)
