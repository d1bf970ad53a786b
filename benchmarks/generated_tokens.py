"""Prepared folders of any size with drawn tokens, in seconds: for benchmarks of reading, not of learning."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.token_writer import TokenWriter
from data_pipeline.read.manifest import (
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    SourceRecord,
    SplitRecord,
    file_record,
    read_manifest,
    write_manifest,
)

PART = 1 << 24  # tokens that are drawn together
VALID = 1 << 20  # tokens of the split valid


def drawn_lengths(tokens: int, seed: int) -> np.ndarray:
    """Lengths of documents that have `tokens` tokens in all, as web pages have them: log-normal, median 403, mean about 740."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(6, 1.1, tokens // 600 + 1).astype(np.int32) + 1
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(dtype=np.int64), tokens))]
    return np.append(lengths, np.int32(tokens - int(lengths.sum(dtype=np.int64))))


def tokenizer_folder(folder: Path) -> Path:
    """A prepared folder with a small tokenizer, of which generated ones take theirs."""
    from pydoc_data.topics import topics

    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics.values()), encoding="utf-8")
    options = PrepareOptions((str(text),), folder / "small", 8192, split=(1.0, 0.0, 0.0))
    prepare(options)
    return folder / "small"


def write_generated(folder: Path, tokens: int, like: Path, seed: int = 0) -> None:
    """A prepared folder with `tokens` tokens of train, and the tokenizer of the prepared folder `like`."""
    model = read_manifest(like)
    folder.mkdir(parents=True)
    shutil.copy(like / TOKENIZER, folder)
    splits = {}
    for name, size in (("train", tokens), ("valid", min(tokens, VALID))):
        splits[name], counts = _write_split(folder, name, size, model, seed)
        if name == "train":
            np.save(folder / TOKEN_COUNTS, counts)
    source = SourceRecord("generated", f"seed {seed}", splits["train"].documents, 0, "0" * 64)
    shares = {name: split.tokens / tokens for name, split in splits.items()}
    counted = file_record(folder / TOKEN_COUNTS)
    same = (model.tokenizer_sha256, model.vocab_size, model.end_of_document, model.dtype)
    write_manifest(
        folder,
        Manifest(model.format_version, model.tool_version, seed, shares, [source], {}, *same, counted, splits),
    )


def _write_split(folder: Path, name: str, tokens: int, model: Manifest, seed: int) -> tuple[SplitRecord, np.ndarray]:
    lengths, writer = drawn_lengths(tokens, seed), TokenWriter(folder, name, model.dtype)
    counts, done = np.zeros(model.vocab_size, np.int64), 0
    draw = np.random.default_rng([seed, len(name)])
    ends = lengths.cumsum(dtype=np.int64)
    while done < len(lengths):  # complete documents, about PART tokens of them
        before = int(ends[done - 1]) if done else 0
        last = max(done + 1, int(np.searchsorted(ends, before + PART)))
        part = lengths[done:last]
        ids = draw.integers(0, model.vocab_size - 1, int(part.sum()), np.uint16)
        ids += ids >= model.end_of_document  # every id but the end of a document
        ids[part.cumsum(dtype=np.int64) - 1] = model.end_of_document
        counts += np.bincount(ids, minlength=model.vocab_size)
        writer.add(ids, part, 4 * len(ids))
        done = last
    writer.finish()
    files = (file_record(folder / f"{name}.{suffix}") for suffix in ("bin", "idx"))
    return SplitRecord(writer.documents, writer.tokens, writer.text_bytes, *files), counts
