"""Turn text into a folder with tokenizer, token files in Megatron's indexed format, token counts and manifest.

The first pass over the input collects the text that trains the tokenizer; a given tokenizer skips it. The second pass encodes
in threads and writes in input order. The same input and options give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import tomllib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from configs.durable import write_text
from configs.errors import UserError
from configs.packages import quiet_megatron
from data_pipeline.folder import atomic_folder, check_output
from data_pipeline.prepare.progress import ByteProgress
from data_pipeline.prepare.sources import ReadOptions, Skipped, Source, find_sources
from data_pipeline.prepare.splitting import Splitter, sample_texts
from data_pipeline.prepare.tokenizer import Tokenizer, train
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

with quiet_megatron():
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

BATCH_BYTES = 1 << 20  # text handed to a worker at a time


@dataclass(frozen=True)
class PrepareOptions:
    inputs: tuple[str, ...]
    output: Path
    vocab_size: int = 8192
    tokenizer: Path | None = None  # if given, none is trained
    split: tuple[float, float, float] = (96, 2, 2)
    workers: int = 1
    read: ReadOptions = field(default_factory=ReadOptions)
    seed: int = 1234
    tokenizer_bytes: int = 32_000_000  # most text the tokenizer is trained on
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    manifest: Manifest
    encode_seconds: float  # duration of the second pass: read, encode and write

    @property
    def text_bytes(self) -> int:
        return sum(split.text_bytes for split in self.manifest.splits.values())


def prepare(options: PrepareOptions) -> Summary:
    """Write `options.output`. UserError for unusable input, a split without documents, or a folder that cannot be written."""
    check_output(options.output, options.overwrite)
    sources = find_sources(options.inputs)
    given = None if options.tokenizer is None else Tokenizer.load(options.tokenizer)
    splitter = Splitter(options.split, options.seed)
    with atomic_folder(options.output, replace=options.overwrite) as folder:
        tokenizer = given or _train_tokenizer(sources, options, splitter)
        write_text(folder / TOKENIZER, tokenizer.text)
        started = monotonic()
        reading = _Reading(sources, options.read)
        encoding = _Encoding(tokenizer, splitter)
        writing = _Writing(folder, options, tokenizer)
        with ByteProgress("encode") as progress:
            for encoded in _in_order(reading.batches(), encoding.encode, options.workers):
                writing.add(encoded)
                progress.advance(sum(encoded.text_bytes))
        splits = writing.finish(reading.skipped)
        seconds = monotonic() - started
        np.save(folder / TOKEN_COUNTS, writing.train_counts)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tool_version=_tool_version(),
            seed=options.seed,
            split_ratios=dict(zip(SPLITS, map(float, options.split), strict=True)),
            sources=reading.records(),
            skipped={reason.value: reading.skipped[reason] for reason in Skipped},
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            dtype=writing.dtype.__name__,
            token_counts=file_record(folder / TOKEN_COUNTS),
            splits=splits,
        )
        write_manifest(folder, manifest)
    return Summary(manifest, seconds)


def _train_tokenizer(sources: list[Source], options: PrepareOptions, splitter: Splitter) -> Tokenizer:
    """Train on documents of the train split only, so that held-out text stays unseen."""

    def train_texts() -> Iterator[str]:
        with ByteProgress("read") as progress:
            for source in sources:
                for text in source.documents(options.read):
                    if isinstance(text, Skipped):
                        continue
                    data = text.encode()
                    progress.advance(len(data))
                    if splitter.split_of(data) == 0:
                        yield text

    sample = sample_texts(train_texts(), options.tokenizer_bytes, options.seed)
    return Tokenizer(train(sample, options.vocab_size), TOKENIZER)


class _Reading:
    """The second pass over the sources; counts and hashes what it reads."""

    def __init__(self, sources: list[Source], options: ReadOptions) -> None:
        self.sources = sources
        self.options = options
        self.skipped: Counter[Skipped] = Counter()
        self._documents = [0] * len(sources)
        self._bytes = [0] * len(sources)
        self._hashes = [hashlib.sha256() for _ in sources]

    def batches(self) -> Iterator[list[bytes]]:
        """Documents as UTF-8 in order, about BATCH_BYTES at a time."""
        batch: list[bytes] = []
        size = 0
        for data in self._texts():
            batch.append(data)
            size += len(data)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _texts(self) -> Iterator[bytes]:
        for number, source in enumerate(self.sources):
            for text in source.documents(self.options):
                if isinstance(text, Skipped):
                    self.skipped[text] += 1
                    continue
                data = text.encode()
                self._documents[number] += 1
                self._bytes[number] += len(data)
                self._hashes[number].update(len(data).to_bytes(8, "little"))
                self._hashes[number].update(data)
                yield data

    def records(self) -> list[SourceRecord]:
        # A path may hold bytes that are not UTF-8; the manifest may not.
        paths = [source.path.encode(errors="backslashreplace").decode() for source in self.sources]
        kinds = [source.kind for source in self.sources]
        columns = zip(kinds, paths, self._documents, self._bytes, self._hashes, strict=True)
        return [SourceRecord(kind, path, documents, size, sha.hexdigest()) for kind, path, documents, size, sha in columns]


@dataclass(frozen=True)
class _Encoded:
    documents: list[tuple[int, np.ndarray]]  # split, and ids including the end of document; in input order
    text_bytes: list[int]  # of each split
    train_counts: np.ndarray  # int64 [vocab_size]


class _Encoding:
    """What a worker does with a batch. Immutable, so that threads can share it."""

    def __init__(self, tokenizer: Tokenizer, splitter: Splitter) -> None:
        self.tokenizer = tokenizer
        self.splitter = splitter
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)

    def encode(self, batch: list[bytes]) -> _Encoded:
        documents: list[tuple[int, np.ndarray]] = []
        text_bytes = [0] * len(SPLITS)
        for data in batch:
            split = self.splitter.split_of(data)
            ids = np.append(self.tokenizer.encode_array(data.decode()), np.uint32(self.tokenizer.end_of_document))
            documents.append((split, ids.astype(self.dtype)))
            text_bytes[split] += len(data)
        train_ids = [ids for split, ids in documents if split == 0]
        joined = np.concatenate(train_ids) if train_ids else np.zeros(0, self.dtype)
        return _Encoded(documents, text_bytes, np.bincount(joined, minlength=self.tokenizer.vocab_size))


class _Writing:
    """Writes the token files of all splits with a share above 0."""

    def __init__(self, folder: Path, options: PrepareOptions, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.ratios = options.split
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.train_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._text_bytes = [0] * len(SPLITS)
        self._documents = [0] * len(SPLITS)
        self._tokens = [0] * len(SPLITS)
        self._builders = {
            split: IndexedDatasetBuilder(str(folder / f"{SPLITS[split]}.bin"), dtype=self.dtype)
            for split, ratio in enumerate(options.split)
            if ratio > 0
        }

    def add(self, encoded: _Encoded) -> None:
        for split, ids in encoded.documents:
            self._builders[split].add_document(ids, [ids.size])
            self._documents[split] += 1
            self._tokens[split] += ids.size
        for split, size in enumerate(encoded.text_bytes):
            self._text_bytes[split] += size
        self.train_counts += encoded.train_counts

    def finish(self, skipped: Counter[Skipped]) -> dict[str, SplitRecord]:
        """Write the .idx files. UserError if a split with a share got no document."""
        total = sum(self._documents)
        if not total:
            left_out = ", ".join(f"{count} {reason.value}" for reason, count in skipped.items()) or "none there"
            raise UserError(f"--input: no document that can be used ({left_out})")
        records = {}
        for split, builder in self._builders.items():
            name, share = SPLITS[split], f"{self.ratios[split]:g} of {sum(self.ratios):g}"
            if not self._documents[split]:
                raise UserError(
                    f"--split: {name} (share {share}) got none of the {total} documents; give more text, split .txt files with "
                    "--document paragraph, choose another --seed, or a larger share, such as --split 80,10,10"
                )
            builder.finalize(str(self.folder / f"{name}.idx"))
            files = [file_record(self.folder / f"{name}.{kind}") for kind in ("bin", "idx")]
            records[name] = SplitRecord(self._documents[split], self._tokens[split], self._text_bytes[split], *files)
        return records


def _in_order(batches: Iterable[list[bytes]], encode: Callable[[list[bytes]], _Encoded], workers: int) -> Iterator[_Encoded]:
    """Encode in `workers` threads; yield results in order, with a bounded number in flight. Encoders release the GIL."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tool_version() -> str:
    try:
        return importlib.metadata.version("manyheads")
    except importlib.metadata.PackageNotFoundError:  # run from the repository
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
