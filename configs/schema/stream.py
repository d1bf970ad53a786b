"""Section `data.stream`: text that a run reads and tokenizes while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs.schema.base import Fault, PathText, Section, path_text

Inputs = Annotated[list[str], AfterValidator(lambda given: [path_text(one) for one in given])]


class StreamConfig(Section):
    """Documents in S streams, each read from its files in order (docs/streaming.md). Without `input` there is none."""

    input: Inputs = Field(
        [],
        description="What is streamed, as launch/prepare.py --input takes it: files, folders, patterns, addresses of fsspec, "
        "hub:OWNER/NAME?name=CONFIG&split=SPLIT, stdlib. This, data.path or data.sources",
    )
    tokenizer: PathText | None = Field(
        None,
        min_length=1,
        description="A prepared folder, a folder of transformers with a tokenizer.json, or the file itself; needed with input",
    )
    text_field: str = Field("text", min_length=1, description="Field or column with the text; a.b is field b inside field a")
    document: Literal["file", "paragraph", "line"] = Field("file", description="What one document of a .txt is")
    shards: int = Field(
        16,
        ge=1,
        le=4096,
        description="Streams S: file i belongs to stream i mod S, sample n to stream n mod S. A multiple of the data-parallel "
        "ranks of every run that resumes; with fewer files than S, several streams share a file and each reads all of it",
    )
    workers: int = Field(1, ge=1, le=256, description="Processes of each rank that read and tokenize ahead of training")
    shuffle_documents: int = Field(
        1000, ge=0, le=10**6, description="Each stream shuffles its documents in blocks of so many; 0: as they come"
    )

    def faults(self) -> Iterator[Fault]:
        if self.input and self.tokenizer is None:
            yield Fault("tokenizer", None, "needed: a folder written by launch/prepare.py, or a tokenizer.json")
        if any(given == "" for given in self.input):
            yield Fault("input", self.input, "must not have empty names")
        if not self.input:
            for name, field in type(self).model_fields.items():
                if (value := getattr(self, name)) != field.default:
                    yield Fault(name, value, f"needs data.stream.input; or set it to {self.default(name)}")
