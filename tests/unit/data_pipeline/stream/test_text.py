"""What a run knows of its text before it reads any."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, DataConfig
from data_pipeline.mix.mixture import origin
from data_pipeline.read.manifest import TOKENIZER, read_manifest
from data_pipeline.stream.text import StreamedText, end_of_document
from pretrain.interop.model_card import _data
from pretrain.objectives.registry import make_objective, vocabulary_of
from pretrain.objectives.spans import Spans
from tests.helpers import write_run
from tests.unit.data_pipeline.stream.by_hand import texts, write


def data_of(folder: Path, tokenizer: Path, **stream: object) -> DataConfig:
    given = {"input": [str(folder)], "tokenizer": str(tokenizer), **stream}
    return DataConfig.model_validate({"stream": given, "sequence_length": 16})


def config_of(folder: Path, tokenizer: Path) -> Config:
    config = load_config(write_run(folder, tokenizer), ["--training.objective=spans"])
    return config.model_copy(update={"data": data_of(folder, tokenizer)})


def test_what_is_streamed_in_words_and_by_hash(tmp_path: Path, prepared: Path) -> None:
    write(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "b.jsonl").write_bytes(b" " * 200_000)
    text = StreamedText.of(data_of(tmp_path, prepared, shards=4, workers=2, shuffle_documents=0))
    expected = f"stream of {tmp_path}: 2 files (0.2 MB) in 4 streams that share files, 2 workers a rank, documents in order"
    assert text.words() == expected
    assert (text.vocab_size, text.end_of_document) == (300, read_manifest(prepared).end_of_document)
    assert StreamedText.of(data_of(tmp_path, prepared)).sha256 == text.sha256
    names, sizes = text.sha256.split(",")
    write(tmp_path / "b.jsonl", texts(1))
    other = StreamedText.of(data_of(tmp_path, prepared)).sha256.split(",")
    assert other[0] == names
    assert other[1] != sizes
    write(tmp_path / "c.jsonl", texts(1))
    assert StreamedText.of(data_of(tmp_path, prepared)).sha256.split(",")[0] != names
    assert (
        _data(config_of(tmp_path, prepared), "e" * 64)["data"]
        == f"streamed from {tmp_path}; SHA-256 of the list of files {'e' * 64}"
    )


def test_the_tokenizer_is_found_for_all_who_need_it(tmp_path: Path, masked_data: Path) -> None:
    for path in (masked_data, masked_data / TOKENIZER):
        data = data_of(tmp_path, path)
        assert Path(data.tokenizer) == masked_data / TOKENIZER
        assert end_of_document(data) == read_manifest(masked_data).end_of_document
    assert end_of_document(DataConfig(path=str(masked_data), sequence_length=16)) == end_of_document(data)
    config = config_of(tmp_path, masked_data)
    spans = make_objective(config)
    assert isinstance(spans, Spans)
    assert spans.end == end_of_document(data)
    assert "<|mask|>" in vocabulary_of(config).special


def test_a_sample_of_a_stream_cannot_be_looked_up(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match=r"data\.stream: its samples can only be read in their order; prepare the text"):
        origin(config_of(tmp_path, prepared), 3)
