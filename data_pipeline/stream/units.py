"""What a stream reads: units, which are files or shards of a hub's data set, and which stream reads which. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from configs.errors import UserError
from configs.schema import StreamConfig
from data_pipeline.prepare import hub
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.files import File
from data_pipeline.prepare.sources import Source, find_sources


@dataclass(frozen=True)
class Unit:
    """A file, or shard `shard` of the `shards` of a hub's data set. `source` says how it is read."""

    source: Source  # without its files
    file: File
    shard: int = 0
    shards: int = 0  # 0: a file

    @property
    def name(self) -> str:
        return f"{self.file.path} shard {self.shard + 1} of {self.shards}" if self.shards else self.file.path


@dataclass(frozen=True)
class Share:
    """What one stream reads: units in their order, and of each the documents with a number ≡ `part` modulo `parts`."""

    units: tuple[Unit, ...]
    part: int = 0
    parts: int = 1


def read_options(config: StreamConfig) -> ReadOptions:
    """How documents are read."""
    return ReadOptions(config.document, config.text_field)


@contextmanager
def said_of_stream() -> Iterator[None]:
    """Errors of `prepare`, which name the options of its command, with the fields of a configuration instead."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("--input ", "data.stream.input: ")
        text = text.replace("choose another with --text-field", "choose another with data.stream.text_field")
        raise UserError(text) from error


def find_units(config: StreamConfig) -> list[Unit]:
    """All units in their order. UserError if an input is missing, or of no known kind."""
    units: list[Unit] = []
    with said_of_stream():
        for source in find_sources(config.input):
            bare = replace(source, files=(), left_out=())
            if source.kind == "hub":
                count = _hub_shards(source.path, read_options(config))
                units += [Unit(bare, source.files[0], shard, count) for shard in range(count)]
            else:
                units += [Unit(bare, file) for file in source.files]
    return units


def _hub_shards(given: str, options: ReadOptions) -> int:
    if hub.parse(given)[1].get("streaming") == "no":
        raise UserError(f"--input {given}: a run streams it; leave out streaming=no, or prepare it with launch/prepare.py")
    with hub.reading_hub(given):
        return int(hub.opened(given, options).num_shards)


def share_of(stream: int, streams: int, units: Sequence[Unit]) -> Share:
    """What stream `stream` of `streams` reads: unit i belongs to stream i mod `streams`.

    If there are fewer units, unit i belongs to all streams ≡ i modulo their number, each of which takes its part of its
    documents.
    """
    count = len(units)
    if count >= streams:
        return Share(tuple(units[stream::streams]))
    unit = stream % count
    return Share((units[unit],), stream // count, (streams - unit - 1) // count + 1)


def fingerprint(units: Sequence[Unit]) -> str:
    """A hash of the names of all units, a comma, and one of their sizes."""
    described = ["\n".join(unit.name for unit in units), "\n".join(str(unit.file.size) for unit in units)]
    return ",".join(hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest() for text in described)
