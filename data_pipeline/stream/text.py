"""The text that a run streams, as a run must know it before it reads any: files and tokenizer. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import DataConfig, StreamConfig
from data_pipeline.read.manifest import read_manifest
from data_pipeline.stream.samples import StreamRules
from data_pipeline.stream.units import Share, Unit, find_units, fingerprint, read_options, share_of

if TYPE_CHECKING:
    from data_pipeline.prepare.tokenizer import Tokenizer


@dataclass(frozen=True)
class StreamedText:
    """What `data.stream` names, found and opened."""

    data: DataConfig
    units: tuple[Unit, ...]
    tokenizer: str  # its JSON
    vocab_size: int
    end_of_document: int
    fast: bool  # encoded by tiktoken

    @classmethod
    def of(cls, data: DataConfig) -> StreamedText:
        """UserError if an input or the tokenizer cannot be read."""
        tokenizer = load_tokenizer(data.stream)
        units = tuple(find_units(data.stream))
        fast = tokenizer.engine == "tiktoken"
        return cls(data, units, tokenizer.text, tokenizer.vocab_size, tokenizer.end_of_document, fast)

    @property
    def sha256(self) -> str:
        """Two of what is streamed, joined by a comma: of the names of all files, and of their sizes."""
        return fingerprint(self.units)

    def rules(self, seed: int) -> StreamRules:
        """What decides the samples of each stream."""
        stream, passes = self.data.stream, int(self.data.max_epochs or 1)
        return StreamRules(read_options(stream), self.data.sequence_length, seed, stream.shuffle_documents, passes)

    def share(self, stream: int) -> Share:
        """What a stream reads."""
        return share_of(stream, self.data.stream.shards, self.units)

    def words(self) -> str:
        """What is streamed, in a line."""
        stream, count, shards = self.data.stream, len(self.units), sum(unit.shards > 0 for unit in self.units)
        kind = "files" if not shards else "shards" if shards == count else "files and shards"
        sizes = [unit.file.size for unit in self.units]
        known = f" ({sum(filter(None, sizes)) / 1e6:,.1f} MB)" if None not in sizes else ""
        inputs = ", ".join(stream.input)
        order = f"blocks of {stream.shuffle_documents:,} shuffled" if stream.shuffle_documents > 1 else "documents in order"
        shared = " that share files" if count < stream.shards else ""
        processes = f"{stream.workers} worker{'s' * (stream.workers > 1)} a rank"
        return f"stream of {inputs}: {count:,} {kind}{known} in {stream.shards} streams{shared}, {processes}, {order}"


def end_of_document(data: DataConfig) -> int:
    """The id after each document, of prepared or of streamed text."""
    return load_tokenizer(data.stream).end_of_document if data.streams else read_manifest(data.parts[0].path).end_of_document


def load_tokenizer(stream: StreamConfig) -> Tokenizer:
    """That of a stream with an input. UserError if it cannot be read or used."""
    from data_pipeline.prepare.tokenizer import Tokenizer  # runs on prepared folders need no tokenizer's packages

    assert stream.tokenizer is not None
    return Tokenizer.load(stream.tokenizer)
