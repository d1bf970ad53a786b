"""What is wrong with the streamed text of a configuration: checks before torch is imported and before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from configs.errors import UserError
from configs.schema import DataConfig, Fault, GHAConfig, ModelConfig, Section, StreamConfig, ValidationConfig
from data_pipeline.faults import model_faults
from data_pipeline.prepare.sources import find_sources
from data_pipeline.read.manifest import manifest_or_reason
from data_pipeline.stream.units import said_of_stream


def stream_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """For `load_config`: faults of `data.stream`, checked against those `sections` that are valid by themselves."""
    data = sections.get("data")
    if not isinstance(data, DataConfig) or not data.streams or list(data.faults()):
        return []
    faults = list(_input_faults(data.stream))
    gha = sections.get("gha")
    if isinstance(gha, GHAConfig) and gha.stage in ("vote", "schedule"):
        wanted = "off or constrain with data.stream: heads are elected on prepared data (launch/prepare.py, data.path)"
        faults.append(Fault("gha.stage", gha.stage, wanted))
    return faults + list(_tokenizer_faults(data.stream, sections))


def _input_faults(stream: StreamConfig) -> Iterator[Fault]:
    for number, given in enumerate(stream.input):
        try:
            with said_of_stream():
                find_sources([given])
        except UserError as error:
            yield Fault(f"data.stream.input[{number}]", given, str(error).removeprefix(f"data.stream.input: {given}: "))


def _tokenizer_faults(stream: StreamConfig, sections: Mapping[str, Section]) -> Iterator[Fault]:
    from data_pipeline.stream.text import load_tokenizer  # here: it imports what tokenizes, which only a stream needs

    try:
        tokenizer = load_tokenizer(stream)
    except UserError as error:
        yield Fault("data.stream.tokenizer", stream.tokenizer, str(error).removeprefix(f"{stream.tokenizer}: "))
        return
    model, validation = sections.get("model"), sections.get("validation")
    if isinstance(model, ModelConfig):
        yield from model_faults(model, tokenizer.vocab_size, tokenizer.end_of_document)
    for name, folder in validation.sets.items() if isinstance(validation, ValidationConfig) else ():
        manifest = manifest_or_reason(Path(folder))
        if not isinstance(manifest, str) and manifest.tokenizer_sha256 != tokenizer.sha256:  # else a fault of the set itself
            wanted = f"prepared with another tokenizer than the stream's; prepare it with --tokenizer {stream.tokenizer}"
            yield Fault(f"validation.sets.{name}", folder, wanted)
