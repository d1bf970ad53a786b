"""From the files of all blocks to a prepared folder: token files, token counts, tokenizer and manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.durable import write_text
from configs.errors import UserError
from data_pipeline.prepare.blocks import BlockFile, Skips
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.duplicates import Duplicates
from data_pipeline.prepare.minhash import Resemblance
from data_pipeline.prepare.sources import Source
from data_pipeline.prepare.token_writer import TokenWriter
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    SourceRecord,
    SplitRecord,
    file_record,
    write_manifest,
)


@dataclass(frozen=True)
class Recipe:
    """What decides the content of a folder, besides the documents."""

    sources: tuple[Source, ...]
    read: ReadOptions
    split: tuple[float, ...]
    seed: int
    deduplicate: bool
    resemblance: Resemblance | None = None  # near duplicates are left out


def assemble(folder: Path, blocks: Sequence[BlockFile], recipe: Recipe, tokenizer: Tokenizer) -> tuple[Manifest, Skips]:
    """Fill `folder` from the blocks in their order. UserError if a split with a share got no document."""
    writing = _Writing(folder, recipe, tokenizer)
    duplicates = _without_duplicates(blocks, recipe, folder)
    try:
        for number, block in enumerate(blocks):
            writing.add(block, None if duplicates is None else duplicates.kept_of(number))
        if duplicates is not None:
            writing.skips.extend(duplicates.skips)
    finally:
        for writer in writing.writers.values():
            writer.close()
    splits = writing.finish()
    write_text(folder / TOKENIZER, tokenizer.text)
    np.save(folder / TOKEN_COUNTS, writing.train_counts)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tool_version=tool_version(),
        seed=recipe.seed,
        split_ratios=dict(zip(SPLITS, map(float, recipe.split), strict=True)),
        sources=writing.source_records(),
        skipped={reason.value: count for reason, count in writing.skips.counts.items()},
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype="uint16" if tokenizer.dtype == "uint16" else "int32",
        token_counts=file_record(folder / TOKEN_COUNTS),
        splits=splits,
    )
    write_manifest(folder, manifest)
    return manifest, writing.skips


def _without_duplicates(blocks: Sequence[BlockFile], recipe: Recipe, folder: Path) -> Duplicates | None:
    """Which documents stay; None if all do."""
    if not recipe.deduplicate and recipe.resemblance is None:
        return None
    duplicates = Duplicates(blocks)
    if recipe.deduplicate:
        duplicates.leave_out_equal()
    if recipe.resemblance is not None:
        duplicates.leave_out_near(recipe.resemblance, folder)
    return duplicates


class _Writing:
    """Writes the token files of all splits with a share above 0, and counts and hashes documents."""

    def __init__(self, folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.folder, self.recipe = folder, recipe
        self.train_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.skips = Skips.of(recipe.read.reasons())
        self.writers = {
            split: TokenWriter(folder, SPLITS[split], tokenizer.dtype) for split, ratio in enumerate(recipe.split) if ratio > 0
        }
        self._documents = [0] * len(recipe.sources)
        self._bytes = [0] * len(recipe.sources)
        self._hashes = [hashlib.sha256() for _ in recipe.sources]

    def add(self, block: BlockFile, kept: np.ndarray | None) -> None:
        ids, lengths, splits, sizes, digests = block.read("ids", "lengths", "splits", "sizes", "digests")
        source = block.source()
        self.skips.extend(block.skips())
        self._documents[source] += lengths.size
        self._bytes[source] += int(sizes.sum())
        self._hashes[source].update(digests.tobytes())
        for split, writer in self.writers.items():
            chosen = splits == split if kept is None else (splits == split) & kept
            chosen_ids = ids[np.repeat(chosen, lengths)]
            writer.add(chosen_ids, lengths[chosen], int(sizes[chosen].sum()))
            if split == 0:
                self.train_counts += np.bincount(chosen_ids, minlength=self.train_counts.size)

    def finish(self) -> dict[str, SplitRecord]:
        """Write the .idx files. UserError if a split with a share got no document."""
        total = sum(writer.documents for writer in self.writers.values())
        if not total:
            left_out = ", ".join(f"{count} {reason.value}" for reason, count in self.skips.counts.items())
            raise UserError(f"--input: no document that can be used ({left_out})")
        records = {}
        for split, writer in self.writers.items():
            name, share = SPLITS[split], f"{self.recipe.split[split]:g} of {sum(self.recipe.split):g}"
            if not writer.documents:
                raise UserError(
                    f"--split: {name} (share {share}) got none of the {total} documents; give more text, split .txt files with "
                    "--document paragraph, choose another --seed, or a larger share, such as --split 80,10,10"
                )
            writer.finish()
            files = [file_record(self.folder / f"{name}.{kind}") for kind in ("bin", "idx")]
            records[name] = SplitRecord(writer.documents, writer.tokens, writer.text_bytes, *files)
        return records

    def source_records(self) -> list[SourceRecord]:
        # A path may hold bytes that are not UTF-8; the manifest may not.
        paths = [source.path.encode(errors="backslashreplace").decode() for source in self.recipe.sources]
        kinds = [source.kind for source in self.recipe.sources]
        columns = zip(kinds, paths, self._documents, self._bytes, self._hashes, strict=True)
        return [SourceRecord(kind, path, documents, size, sha.hexdigest()) for kind, path, documents, size, sha in columns]


def tool_version() -> str:
    try:
        return importlib.metadata.version("manyheads")
    except importlib.metadata.PackageNotFoundError:  # run from the repository
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
