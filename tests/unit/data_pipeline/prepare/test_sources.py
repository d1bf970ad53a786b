"""Documents out of every kind of file, and what a bad file says."""

import errno
import gzip
import json
import os
import socket
from pathlib import Path

import pyarrow as arrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from configs.errors import UserError
from data_pipeline.prepare.documents import ReadOptions, Skipped
from data_pipeline.prepare.sources import find_sources


def read(*inputs: Path | str, options: ReadOptions | None = None) -> list[str | Skipped]:
    sources = find_sources(map(str, inputs))
    return [text for source in sources for text in source.documents(options or ReadOptions())]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_stdlib_is_there_without_tests_in_a_fixed_order() -> None:
    files = find_sources(["stdlib"])[0].files
    names = [file.name for file in files]
    assert "argparse.py" in names
    assert names.index("argparse.py") < names.index("zipapp.py")
    assert not any({"test", "tests", "site-packages"}.intersection(Path(file.path).parts[-3:]) for file in files)


def test_text_as_files_paragraphs_and_lines(tmp_path: Path) -> None:
    content = "\ufeffone\ntwo\n\n \nthree\r\n"
    file = write(tmp_path / "a.txt", content)
    assert read(file) == ["one\ntwo\n\n \nthree\r\n"]
    assert read(file, options=ReadOptions("paragraph")) == ["one\ntwo", "three"]
    lines = read(file, options=ReadOptions("line"))
    assert [line for line in lines if isinstance(line, str)] == ["one", "two", "three"]


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path: Path, packed: bool) -> None:
    data = b"\n".join(
        [b'{"text": "a\\nb"}', b'{"text": "\xff"}', b"", b'{"text": " "}', b'{"text": "\\ud800"}', b'{"text": "c"}']
    )
    file = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    write(file, gzip.compress(data) if packed else data)
    assert read(file) == ["a\nb", Skipped.NOT_UTF8, Skipped.EMPTY, Skipped.NOT_UTF8, "c"]


def test_parquet(tmp_path: Path) -> None:
    broken = arrow.Array.from_buffers(
        arrow.string(), 3, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), arrow.py_buffer(b"a\xffb")]
    )
    parquet.write_table(arrow.table({"body": broken, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", options=ReadOptions(text_field="body")) == ["a", Skipped.NOT_UTF8, "b"]
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'text' \(columns: body, n\)"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int, not text"):
        read(tmp_path / "a.parquet", options=ReadOptions(text_field="n"))


def test_hugging_face_folder(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["x", None, "y"]})
    rows.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ["x", Skipped.EMPTY, "y"]
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    with pytest.raises(UserError, match="name one or more of its folders: train"):
        read(tmp_path / "several")


def test_folder_is_read_recursively_and_sorted_and_inputs_add_up(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "z.jsonl", json.dumps({"text": "second"}))
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "notes.md", "ignored")
    write(tmp_path / ".hidden.txt", "ignored")
    assert read(tmp_path, tmp_path / "a.txt") == ["first", "second", "first"]


def test_text_that_is_not_utf8_is_marked(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"caf\xe9")) == [Skipped.NOT_UTF8]
    assert read(write(tmp_path / "b.txt", "")) == [Skipped.EMPTY]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "a.jsonl:2: not valid JSON"),
        ("[1]", "a.jsonl:2: holds list"),
        ('{"body": "x"}', r"a.jsonl:2: has no field 'text' \(fields here: body\)"),
        ('{"text": 3}', "a.jsonl:2: field 'text' holds int"),
        ("[" * 100_000, "a.jsonl:2: not valid JSON"),
    ],
)
def test_bad_json_line_names_its_place(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(file)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_sources([str(tmp_path / "none.txt")])
    with pytest.raises(UserError, match=r"unknown kind of file; known are \.txt, \.jsonl, .*stdlib"):
        find_sources([str(write(tmp_path / "a.doc", "x"))])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file of a known kind"):
        find_sources([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"x: cannot be read: File name too long$"):
        find_sources(["x" * 300])
    for name in ("a.jsonl.gz", "a.parquet"):
        with pytest.raises(UserError, match=name):
            read(write(tmp_path / name, b"this is neither"))
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    with pytest.raises(UserError, match="cut"):
        read(write(tmp_path / "cut.jsonl.gz", whole[:-12]))


def test_pipes_sockets_and_devices_are_refused_without_a_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.txt"))
        for path in (tmp_path / "pipe.txt", tmp_path / "socket.txt", Path("/dev/zero")):
            with pytest.raises(UserError, match="is neither a file nor a folder"):
                read(path)
    with pytest.raises(UserError, match=r"pipe\.txt is no regular file"):
        read(tmp_path)


def test_folder_without_permission_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    write(tmp_path / "a.txt", "text")
    real = os.scandir

    def scandir(path: str) -> object:  # root may read everything, so the permission itself would prove nothing
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for given in (tmp_path, tmp_path / "closed"):
        with pytest.raises(UserError, match=f"--input {given}: cannot be read: Permission denied"):
            read(given)
