"""What is refused before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError, load_config
from data_pipeline.faults import data_faults
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.stream.faults import stream_faults
from tests.helpers import write_run, write_text_files
from tests.unit.data_pipeline.stream.by_hand import texts, write

GIVEN = "--data.stream.input=[{0}/a.jsonl]", "--data.stream.tokenizer={1}"
CASES = {
    "two kinds of data": (
        ["--data.path={1}"],
        ["--data.path={1}: data.path and data.stream are given; keep one of them"],
    ),
    "no tokenizer": (["--data.stream.tokenizer=null"], ["tokenizer=null: needed: a folder written by launch/prepare.py, or a"]),
    "no such input": (
        ["--data.stream.input=[{0}/a.jsonl, {0}/b.jsonl]"],
        ["data.stream.input[1] = '{0}/b.jsonl': no such file or folder"],
    ),
    "of no known kind": (["--data.stream.input=[{0}/run.yaml]"], ["run.yaml': unknown kind of file; known are .txt"]),
    "no such tokenizer": (["--data.stream.tokenizer={0}"], ["holds no tokenizer.json"]),
    "ranks": (
        ["--data.stream.shards=8"],
        ["shards=8: a multiple of the data-parallel ranks (3), such as 6; a run that began with 8 resumes on 1, 2, 4, 8 ranks"],
    ),
    "packing": (["--data.packing=best_fit"], ["a stream is packed as it comes: take concatenate or documents"]),
    "epochs": (["--data.max_epochs=1.5"], ["--data.max_epochs=1.5: a whole number with data.stream"]),
    "left out": (["--training.skip_samples=[[3, 9]]", "--data.stream.shards=6"], ["with data.stream, bounds that 6 divides"]),
    "a vote": (
        ["--gha.stage=vote", "--gha.groups=2"],
        ["off or constrain with data.stream: heads are elected on prepared data"],
    ),
    "a small vocabulary": (
        ["--model.vocab_size=100"],
        ["--model.vocab_size=100: at least the tokenizer's size (300), or null"],
    ),
    "another end": (
        ["--data.packing=documents", "--model.end_of_document=7"],
        ["--model.end_of_document=7: the tokenizer's (0), or null"],
    ),
    "options without a stream": (["--data.stream.input=[]", "--data.path={1}"], ["needs data.stream.input; or set it to null"]),
    "another tokenizer": (
        ["--validation.sets={{other: {0}/other}}"],
        ["sets.other = '{0}/other': prepared with another tokenizer than the stream's; prepare it with --tokenizer {1}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_stream_may_not_be(tmp_path: Path, prepared: Path, case: str) -> None:
    overrides, expected = CASES[case]
    path = write_run(tmp_path, prepared)
    path.write_text(path.read_text().replace(f"path: {prepared}, ", "").replace("batch_size: 8", "batch_size: 12"))
    write(tmp_path / "a.jsonl", texts(2))
    if case == "another tokenizer":
        inputs = (str(write_text_files(tmp_path / "texts", documents=9)),)
        prepare(PrepareOptions(inputs, tmp_path / "other", vocab_size=280, split=(5, 4, 0)))
    given = [text.format(tmp_path, prepared) for text in (*GIVEN, "--data.stream.shards=6", *overrides)]
    with pytest.raises(ConfigError) as raised:
        load_config(str(path), given, checks=[data_faults, stream_faults], world_size=3)
    for line in expected:
        assert line.format(tmp_path, prepared) in str(raised.value)
    assert len(raised.value.faults) == len(expected) + (case == "options without a stream")
