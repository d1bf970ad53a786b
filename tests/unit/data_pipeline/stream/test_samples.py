"""Streams to the token: every format, shuffled or not, pass after pass, and from every position on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import TOKENIZER
from data_pipeline.stream.samples import Position, Stream, StreamEndError
from data_pipeline.stream.text import StreamedText
from tests.unit.data_pipeline.stream.by_hand import json_lines, samples_of, shuffled, texts, tokens_of, write

LENGTH, SEED = 16, 7


def opened(prepared: Path, inputs: list[str], shards: int, shuffle: int = 0, passes: int = 1) -> StreamedText:
    stream = {"input": inputs, "tokenizer": str(prepared), "shards": shards, "shuffle_documents": shuffle}
    return StreamedText.of(DataConfig.model_validate({"stream": stream, "sequence_length": LENGTH, "max_epochs": passes}))


@cache
def tokenizer_of(text: str) -> Tokenizer:
    return Tokenizer(text, "test")


def stream_of(text: StreamedText, number: int, start: Position | None = None) -> Stream:
    tokenizer = tokenizer_of(text.tokenizer)

    def encode(document: str) -> np.ndarray:
        return np.append(tokenizer.encode_array(document), np.uint32(tokenizer.end_of_document))

    return Stream(number, text.share(number), text.rules(SEED), encode, start or Position())


def read(stream: Stream) -> Iterator[tuple[np.ndarray, Position]]:
    try:
        while True:
            yield stream.sample()
    except StreamEndError:
        return


def check(text: StreamedText, number: int, expected: np.ndarray, every: int = 1) -> None:
    """All samples of a stream, and those that follow each `every`-th position."""
    found = list(read(stream_of(text, number)))
    np.testing.assert_array_equal([sample for sample, _ in found], expected)
    for place in range(0, len(found), every):
        position = Position.of(found[place][1].numbers())
        assert position.samples == place + 1
        rest = [sample for sample, _ in read(stream_of(text, number, position))]
        np.testing.assert_array_equal(np.array(rest).reshape(-1, LENGTH + 1), expected[place + 1 :])


@pytest.mark.parametrize("block", [0, 3], ids=["in order", "shuffled"])
def test_streams_of_compressed_json_lines(tmp_path: Path, prepared: Path, block: int) -> None:
    names = ["0.jsonl.zst", "1.jsonl.gz", "2.jsonl", "3.jsonl.zst", "4.ndjson"]
    files = [texts(4 + number, number) for number in range(len(names))]
    for name, documents in zip(names, files, strict=True):
        write(tmp_path / name, documents)
    with (tmp_path / "2.jsonl").open("ab") as plain:
        plain.write(b'\n{"text": "  "}\n{"text": null}\n')  # what is empty is no document
    given = f"file://{tmp_path}" if block else str(tmp_path)  # an address, as those of stores, and a folder
    text = opened(prepared, [given], shards=2, shuffle=block, passes=2)
    for number in range(2):
        documents = [document for file in files[number::2] for document in file]
        order = [shuffled(documents, number, passes, SEED, block or 1) for passes in range(2)]
        assert (order[0] != order[1]) == (block > 0)
        check(text, number, samples_of(tokens_of([*order[0], *order[1]], prepared / TOKENIZER), LENGTH))


def write_parquet(path: Path, documents: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=3)


def write_array(path: Path, documents: list[str]) -> None:
    path.write_text(json.dumps([{"text": document} for document in documents]))


def write_text(path: Path, documents: list[str]) -> None:
    path.write_text(documents[0], newline="")


@pytest.mark.parametrize(("name", "writer"), [("a.parquet", write_parquet), ("a.json", write_array), ("a.txt", write_text)])
def test_streams_of_other_formats(tmp_path: Path, prepared: Path, name: str, writer: object) -> None:
    documents = texts(8, longest=200)[:: 8 if name == "a.txt" else 1]
    writer(tmp_path / name, documents)  # type: ignore[operator]
    text = opened(prepared, [str(tmp_path / name)], shards=1, shuffle=3)
    check(text, 0, samples_of(tokens_of(shuffled(documents, 0, 0, SEED, 3), prepared / TOKENIZER), LENGTH), every=4)


def test_streams_of_a_data_set_of_the_hub(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files = [texts(4, number) for number in range(3)]
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, documents in enumerate(files):
        (tmp_path / "set" / "data" / f"train-{number}.jsonl").write_bytes(json_lines(documents))
    text = opened(prepared, [f"hub:{tmp_path / 'set'}"], shards=2, shuffle=3)
    assert text.words().startswith(f"stream of hub:{tmp_path / 'set'}: 3 shards in 2 streams, 1 worker")
    for number in range(2):
        documents = [document for file in files[number::2] for document in file]
        expected = samples_of(tokens_of(shuffled(documents, number, 0, SEED, 3), prepared / TOKENIZER), LENGTH)
        check(text, number, expected, every=3)
    (tmp_path / "set" / "data" / "train-1.jsonl").write_bytes(json_lines(files[1]) + b"{broken\n")
    with pytest.raises(UserError, match=r"data\.stream\.input: hub:.*set shard 2 of 3: cannot be read: JSON parse error"):
        list(read(stream_of(text, 1)))


def test_streams_share_files_if_there_are_too_few(tmp_path: Path, prepared: Path) -> None:
    files = [texts(11, 1), texts(9, 2)]
    for number, documents in enumerate(files):
        write(tmp_path / f"{number}.jsonl.zst", documents)
    text = opened(prepared, [str(tmp_path)], shards=5)
    own = [files[0][0::3], files[1][0::2], files[0][1::3], files[1][1::2], files[0][2::3]]
    for number, documents in enumerate(own):
        check(text, number, samples_of(tokens_of(documents, prepared / TOKENIZER), LENGTH), every=2)


def test_counts_of_documents_and_bytes(tmp_path: Path, prepared: Path) -> None:
    documents = texts(6)
    write(tmp_path / "a.jsonl", documents)
    *_, (_, last) = read(stream_of(opened(prepared, [str(tmp_path)], shards=1, passes=3), 0))
    ends = np.cumsum([tokens_of([document], prepared / TOKENIZER).size for document in documents * 3])
    begun = int(np.searchsorted(ends, last.samples * LENGTH, side="right"))  # whose last token comes before the next sample
    assert (last.documents, last.passes) == (begun, 2)
    assert last.text_bytes == sum(len(document.encode()) for document in (documents * 3)[:begun])


def test_a_stream_without_documents(tmp_path: Path, prepared: Path) -> None:
    write(tmp_path / "a.jsonl", ["one document, and not two"])
    with pytest.raises(UserError, match=r"stream 1 has no document in .*a\.jsonl, of which it reads part 2 of 2; set data.str"):
        stream_of(opened(prepared, [str(tmp_path)], shards=2, passes=2), 1).sample()


BAD = {
    "cut off": (
        "a.jsonl.zst",
        lambda content: pyarrow.compress(content, "zstd", asbytes=True)[:-30],
        r"a\.jsonl\.zst: is cut off",
    ),
    "no JSON": ("a.jsonl", lambda content: content + b'{"text": "x\n', r"a\.jsonl:41: not valid JSON"),
    "cut off, plain": ("a.jsonl", lambda content: content[:-4], r"a\.jsonl:40: not valid JSON"),
    "no JSON, compressed": (
        "a.jsonl.zst",
        lambda content: pyarrow.compress(content + b"[1", "zstd", asbytes=True),
        r"a\.jsonl\.zst:41: not valid JSON",
    ),
    "no text": (
        "a.jsonl",
        lambda content: content + b'{"texts": 1}',
        r"a\.jsonl:41: has no field 'text' .*with data.stream.text_f",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_input_is_named_with_its_line(tmp_path: Path, prepared: Path, case: str) -> None:
    name, damage, expected = BAD[case]
    (tmp_path / name).write_bytes(damage(json_lines(texts(40))))
    with pytest.raises(UserError, match=expected) as raised:
        list(read(stream_of(opened(prepared, [str(tmp_path / name)], shards=1), 0)))
    assert "--" not in str(raised.value)
