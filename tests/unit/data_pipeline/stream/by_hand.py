"""Streams written by hand from the rule in docs/streaming.md, with the tokenizers library alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import tokenizers

END = "<|endoftext|>"
WORDS = ["many", "heads", "attend", "naïve", "\n", "x = 1", "東京", "  ", "the", "end"]


def texts(number: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Documents of 1 to `longest` words."""
    draw = random.Random(seed)
    return [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randrange(1, longest))) for n in range(number)]


def json_lines(documents: Sequence[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(documents)).encode()


def write(path: Path, documents: Sequence[str]) -> None:
    """A file of JSON lines, compressed as its name says."""
    content = json_lines(documents)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)


def tokens_of(documents: Sequence[str], tokenizer: Path) -> np.ndarray:
    """All documents, each with its end."""
    made = tokenizers.Tokenizer.from_file(str(tokenizer))
    end = made.token_to_id(END)
    return np.array([token for text in documents for token in [*made.encode(text).ids, end]], np.int64)


def shuffled(documents: Sequence[str], stream: int, passes: int, seed: int, block: int) -> list[str]:
    """The documents of a stream in the order in which a pass has them."""
    found: list[str] = []
    for number, first in enumerate(range(0, len(documents), block)):
        part = documents[first : first + block]
        if len(part) > 1:
            digest = hashlib.sha256(f"stream {stream}, pass {passes}, block {number}, seed {seed}".encode()).digest()
            part = [part[place] for place in np.random.RandomState(int.from_bytes(digest[:4])).permutation(len(part))]
        found += part
    return found


def samples_of(tokens: np.ndarray, length: int) -> np.ndarray:
    """All samples of a stream, int64 [samples, length + 1]."""
    starts = range(0, len(tokens) - length, length)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def global_batch(streams: Sequence[np.ndarray], numbers: Sequence[int]) -> set[tuple[int, ...]]:
    """The samples of these numbers."""
    return {tuple(streams[n % len(streams)][n // len(streams)].tolist()) for n in numbers}
