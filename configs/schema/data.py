"""Section `data`: the prepared tokens of one source or a mixture of several, or a stream of text; the length of a sample."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from configs.schema.base import Fault, NameText, PathText, Section, name_keys
from configs.schema.stream import StreamConfig

ByName = Annotated[dict[str, float], BeforeValidator(name_keys)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class SourceConfig(Section):
    """A part of a mixture."""

    path: PathText = Field(min_length=1, description="Folder written by launch/prepare.py")
    name: NameText | None = Field(
        None, max_length=60, pattern=NAME, description="What figures and messages call it; null: the folder's name"
    )
    weight: float | None = Field(
        None, gt=0, le=1e9, description="Its share of the samples; weights are divided by their sum. This or epochs"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="How often it is used in the time in which the other sources are used as often as theirs say",
    )

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or os.path.basename(os.path.abspath(self.path))


class PhaseConfig(Section):
    """Other weights from a step on."""

    from_step: int = Field(ge=0, le=10**9, description="The first optimizer step, counted from 0, that has these weights")
    weights: ByName = Field({}, description="Weights by the names of sources; a source that is not named has no samples")
    epochs: ByName = Field({}, description="In the place of weights: numbers of epochs by the names of sources, as in sources")


class DataConfig(Section):
    path: PathText | None = Field(
        None,
        min_length=1,
        description="Folder written by launch/prepare.py: token files, tokenizer.json, manifest.json. This, sources or stream",
    )
    sources: list[SourceConfig] = Field([], description="Parts of a mixture, with one tokenizer")
    stream: StreamConfig = StreamConfig()
    schedule: list[PhaseConfig] = Field([], description="Changes of the weights of the sources, by ascending steps")
    max_epochs: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="How often a run may use any source at most; more is an error before it starts. Of a stream: how "
        "often it may be read, a whole number; null: once",
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens per training sample")
    packing: Literal["concatenate", "documents", "best_fit"] = Field(
        "concatenate",
        description="What a sample holds. concatenate: the next sequence_length tokens of the shuffled text; documents: the "
        "same, but each document is computed as if alone and its first token is no label; best_fit: complete documents that "
        "together fill a sample best, apart as well; only longer ones are split (docs/packing.md)",
    )

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether a document is trained on as if it were alone in its sample."""
        return self.packing != "concatenate"

    @property
    def streams(self) -> bool:
        """Whether the text is read and tokenized while the run trains."""
        return bool(self.stream.input)

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, also if there is one alone; none of a stream."""
        return self.sources if self.path is None else [SourceConfig(path=self.path, weight=1.0)]

    @property
    def tokenizer(self) -> str:
        """Path of the tokenizer.json: the streamed text's, or that of the first source, which all have."""
        if not self.streams:
            return os.path.join(self.parts[0].path, "tokenizer.json")
        given = self.stream.tokenizer or ""
        return os.path.join(given, "tokenizer.json") if os.path.isdir(given) else given

    def faults(self) -> Iterator[Fault]:
        names = [source.label for source in self.sources]
        given = {"path": self.path is not None, "sources": bool(self.sources), "stream": self.streams}
        if not any(given.values()):
            yield Fault("path", self.path, "needed, or a list of sources, or a stream with an input; one of the three")
        elif sum(given.values()) > 1:
            several = " and ".join(f"data.{name}" for name, is_given in given.items() if is_given)
            yield Fault("path" if given["path"] else "sources", self.path, f"{several} are given; keep one of them")
        if self.streams:
            yield from self._stream_faults()
        for fault in self.stream.faults():
            yield Fault(f"stream.{fault.key}", fault.value, fault.allowed)
        for number, source in enumerate(self.sources):
            if not re.fullmatch(NAME, source.label):
                yield Fault(f"sources[{number}]", source.label, "the folder's name is no name for figures; give it a name")
            if (source.weight is None) == (source.epochs is None):
                yield Fault(f"sources[{number}]", source.label, "needs a weight or a number of epochs; one of the two")
            elif (source.weight is None) != (self.sources[0].weight is None):
                yield Fault(f"sources[{number}]", source.label, "all sources need a weight, or all a number of epochs")
            if source.label in names[:number]:
                yield Fault(f"sources[{number}].name", source.label, "another source has it; each needs its own")
        yield from self._schedule_faults(names)

    def _stream_faults(self) -> Iterator[Fault]:
        if self.packing == "best_fit":
            wanted = "a stream is packed as it comes: take concatenate or documents; best_fit needs prepared data (data.path)"
            yield Fault("packing", self.packing, wanted)
        if self.max_epochs is not None and self.max_epochs != int(self.max_epochs):
            yield Fault("max_epochs", self.max_epochs, "a whole number with data.stream: how often it may be read")

    def _schedule_faults(self, names: list[str]) -> Iterator[Fault]:
        last = -1
        for number, phase in enumerate(self.schedule):
            if phase.from_step <= last:
                yield Fault(f"schedule[{number}].from_step", phase.from_step, f"above {last}: steps ascend")
            last = phase.from_step
            if bool(phase.weights) == bool(phase.epochs):
                yield Fault(f"schedule[{number}]", phase.from_step, "needs weights or epochs; one of the two")
            for key, given in (("weights", phase.weights), ("epochs", phase.epochs)):
                for name, value in given.items():
                    if name not in names:
                        known = ", ".join(names) or "none, as there are no data.sources"
                        yield Fault(f"schedule[{number}].{key}", name, f"a name of a source ({known})")
                    elif not 0 < value <= 1e9:
                        yield Fault(f"schedule[{number}].{key}.{name}", value, "above 0; leave out a source without samples")
