"""What processes do with a block: give pieces for the tokenizer's sample, or encode its documents. And train the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data_pipeline.prepare.blocks import Block, BlockFile, Encoded, Places, Skips
from data_pipeline.prepare.documents import ReadOptions, Record, Skipped
from data_pipeline.prepare.minhash import PERMUTATIONS, Resemblance, Signer
from data_pipeline.prepare.sources import Source
from data_pipeline.prepare.splitting import Extract, Splitter, extracts, shorten_runs
from data_pipeline.prepare.tokenizer import Tokenizer, train

DIGEST = 16  # bytes


@dataclass(frozen=True)
class Reading:
    """How all processes read documents."""

    sources: tuple[Source, ...]
    options: ReadOptions
    split: tuple[float, ...]
    seed: int

    @cached_property
    def splitter(self) -> Splitter:
        return Splitter(self.split, self.seed)

    def records(self, block: Block) -> Iterator[Record]:
        for piece in block.pieces:
            yield from self.sources[block.source].read(piece, self.options)


@dataclass(frozen=True)
class Sampling:
    """Give what of a block may enter the sample: documents of the train split only, so that held-out text stays unseen."""

    reading: Reading

    def __call__(self, task: tuple[Block, int]) -> tuple[int, list[Extract]]:
        """Of a block and a bound, the bytes that were read and the pieces with hashes below the bound."""
        block, bound = task
        size = 0
        found: list[Extract] = []
        for record in self.reading.records(block):
            if isinstance(record.text, Skipped):
                continue
            data = record.text.encode()
            size += len(data)
            if self.reading.splitter.split_of(data) == 0:
                found += extracts([record.text], self.reading.seed, bound)
        return size, found


@dataclass(frozen=True)
class Training:
    """Train a tokenizer on a sample; give its JSON."""

    vocab_size: int
    seed: int
    special_tokens: tuple[str, ...]

    def __call__(self, sample: list[str]) -> str:
        return train(shorten_runs(sample, self.seed), self.vocab_size, self.special_tokens)


@dataclass(frozen=True)
class Encoding:
    """Encode a block into its file. The tokenizer is loaded once in each process."""

    reading: Reading
    folder: Path  # of the block files
    text: str  # of the tokenizer's file
    fast: bool  # encode with tiktoken
    resemblance: Resemblance | None = None  # sign documents for it

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.text, "the tokenizer", fast=self.fast)

    @cached_property
    def signer(self) -> Signer | None:
        return None if self.resemblance is None else Signer()

    def __call__(self, block: Block) -> int:
        """The bytes of text that were encoded."""
        encoded = self.encode(block)
        block_file(self.folder, block.number).save(encoded)
        return int(encoded.sizes.sum())

    def encode(self, block: Block) -> Encoded:
        ids: list[np.ndarray] = []
        splits: list[int] = []
        sizes: list[int] = []
        digests: list[bytes] = []
        signatures: list[np.ndarray] = []
        places = Places()
        skips = Skips.of(self.reading.options.reasons())
        end = np.array([self.tokenizer.end_of_document], dtype=np.uint32)
        for record in self.reading.records(block):
            if isinstance(record.text, Skipped):
                skips.add(record)
                continue
            data = record.text.encode()
            ids += [self.tokenizer.encode_array(record.text), end]
            splits.append(self.reading.splitter.split_of(data))
            sizes.append(len(data))
            digests.append(blake2b(data, digest_size=DIGEST).digest())
            places.add(record.place)
            if self.signer is not None:
                signatures.append(self.signer.sign(record.text))
        lengths = np.array([text.size + 1 for text in ids[::2]], dtype=np.int32)
        joined = np.concatenate(ids).astype(self.tokenizer.dtype) if ids else np.zeros(0, self.tokenizer.dtype)
        return Encoded(
            block.source,
            joined,
            lengths,
            np.array(splits, dtype=np.uint8),
            np.array(sizes, dtype=np.int64),
            np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST),
            places,
            skips,
            *self._signed(signatures),
        )

    def _signed(self, signatures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Signatures in one array, and their bands."""
        if self.resemblance is None:
            return None, None
        joined = np.array(signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        return joined, self.resemblance.keys(joined)


def block_file(folder: Path, number: int) -> BlockFile:
    return BlockFile(folder / f"{number:08d}.npz")
