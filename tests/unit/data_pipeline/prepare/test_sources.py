"""Documents out of every kind of file, and what a bad file says."""

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as arrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import ipc, parquet

from configs.errors import UserError
from data_pipeline.prepare import columns, json_array
from data_pipeline.prepare import lines as lines_module
from data_pipeline.prepare.documents import DocumentUnit, ReadOptions, Skipped
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
    assert read(tmp_path) == ["x", Skipped.EMPTY, "y"] * 2  # their own .json files are no documents


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
    with pytest.raises(UserError, match=r"--input owner/name: no such .*; a data set of the hub is written hub:owner/name"):
        find_sources(["owner/name"])
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


def zstandard(data: bytes) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


Compress = Callable[[bytes], bytes]
COMPRESS: dict[str, Compress] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("form", sorted(COMPRESS))
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_compressed_files_and_cut_ones(tmp_path: Path, form: str, kind: str) -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choice("abcdefgh ") for _ in range(200)).strip() for _ in range(300)]
    rows = [{"text": text} for text in texts]
    content = {".txt": "\n".join(texts), ".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps(rows, indent=1)}[kind]
    whole = COMPRESS[form](content.encode())
    file = write(tmp_path / f"a{kind.upper()}{form}", whole)
    assert read(file, options=ReadOptions("line")) == texts
    for size in (0, 1, 5, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        write(file, whole[:size])
        with pytest.raises(UserError, match=rf"a{kind.upper()}{form}: is cut off or damaged"):
            read(file, options=ReadOptions("line"))


def test_json_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f'{number} naïve "quoted" {"x" * number}' for number in range(50)]
    rows = [{"text": text, "n": [number, {"a": None}]} for number, text in enumerate(texts)]
    monkeypatch.setattr(json_array, "CHUNK", 7)
    for content in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "\ufeff \n" + json.dumps(rows)):
        assert read(write(tmp_path / "a.json", content)) == texts
    assert read(write(tmp_path / "a.json", "[ ]\n")) == []
    assert read(write(tmp_path / "a.json", b'[{"text": "\xff"}, {"text": "b"}]')) == [Skipped.NOT_UTF8, "b"]
    assert read(write(tmp_path / "a.json", "\n".join(map(json.dumps, rows)))) == texts
    assert read(write(tmp_path / "a.json", '[{"text": "x", "id": ' + "9" * 5000 + "}]")) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"text": "a"},\n{"text": b}]', "a.json:3: not valid JSON (Expecting value)"),
        ('[\n{"text": "a"}\n{"text": "b"}]', "a.json:3: not valid JSON (',' is missing)"),
        ('[\n{"text": "a"},\n{"text": "b', "a.json:3: not valid JSON (the file ends within the array)"),
        ('[\n{"text": "a"},\n', "a.json:3: not valid JSON (the file ends within the array)"),
        ('[\n{"text": "a"}', "a.json:2: not valid JSON (the file ends within the array)"),
        ('[{"text": "a"}]\n[]', "a.json:2: not valid JSON (something follows the array)"),
        ('[{"text": "a"},\n3]', "a.json:2: holds int, not an object"),
        ('[{"body": "a"}]', "a.json:1: has no field 'text' (fields here: body)"),
        ("[" + "[" * 100_000, "a.json:1: not valid JSON (nested too deeply)"),
        ('{\n"text": "a"}', "a.json:1: not valid JSON"),
    ],
)
def test_bad_json_arrays_name_their_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(write(tmp_path / "a.json", content))


def test_nested_fields_and_ids(tmp_path: Path) -> None:
    rows = [{"a": {"b": "one"}, "key": "k1"}, {"a": {"b": None}, "key": "k2"}, {"a": {"b": "three"}, "key": "k3"}]
    table = arrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "a.json", json.dumps(rows))
    options = ReadOptions(text_field="a.b", id_field="key")
    for kind, place in (("parquet", ", row 2"), ("arrow", ", row 2"), ("jsonl", ":2"), ("json", ":1")):
        (source,) = find_sources([f"{tmp_path}/a.{kind}"])
        records = [record for piece in source.pieces(options) for record in source.read(piece, options)]
        assert [record.text for record in records] == ["one", Skipped.EMPTY, "three"]
        assert str(records[1].place) == f"{tmp_path}/a.{kind}{place} (id k2)"
    dotted = write(tmp_path / "dotted.jsonl", '{"a.b": "literal", "a": {"b": "nested"}}')
    assert read(dotted, options=ReadOptions(text_field="a.b")) == ["literal"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no field 'a\.c' \(fields here: a, key\)"):
        read(tmp_path / "a.jsonl", options=ReadOptions(text_field="a.c"))
    with pytest.raises(UserError, match=r"a\.arrow: has no column 'c\.d' .*choose another with --text-field"):
        read(tmp_path / "a.arrow", options=ReadOptions(text_field="c.d"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no field 'name' .*choose another with --id-field"):
        read(tmp_path / "a.jsonl", options=ReadOptions(text_field="a.b", id_field="name"))


@pytest.mark.parametrize("size", [1, 50, 400])
def test_files_in_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Wherever a file is cut, its documents are those of the file in one piece, at the same places."""
    draw = random.Random(size)
    lines = [draw.choice(["", "  ", "\r", "word " * draw.randrange(1, 9)]) for _ in range(300)]
    file = write(tmp_path / "a.txt", "\n".join(lines))
    write(tmp_path / "b.txt.gz", gzip.compress(file.read_bytes()))
    table = arrow.table({"text": [line or None for line in lines]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    with ipc.new_stream(tmp_path / "d.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=64)

    def records(name: str, unit: DocumentUnit) -> tuple[int, list[tuple[str | Skipped, str]]]:
        (source,) = find_sources([str(tmp_path / name)])
        pieces = list(source.pieces(ReadOptions(unit)))
        found = [record for piece in pieces for record in source.read(piece, ReadOptions(unit))]
        return len(pieces), [(record.text, str(record.place)) for record in found]

    cases = [("a.txt", "line"), ("a.txt", "paragraph"), ("b.txt.gz", "line"), ("b.txt.gz", "paragraph")]
    cases += [("c.parquet", "file"), ("d.arrow", "file")]
    whole = [records(name, unit)[1] for name, unit in cases]  # type: ignore[arg-type]
    for module in (lines_module, columns):
        monkeypatch.setattr(module, "PIECE_BYTES", size)
    for (name, unit), expected in zip(cases, whole, strict=True):
        pieces, found = records(name, unit)  # type: ignore[arg-type]
        assert found == expected
        assert pieces > 3


def test_endings_in_any_case_and_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "B.JSONL", "c.Json", "d.NDJSON"):
        write(tmp_path / name, '{"text": "x"}\n{"text": "y"}\n')
    write(tmp_path / "notes.md", "x")
    write(tmp_path / "e.parquet.gz", "x")
    (source,) = find_sources([str(tmp_path)])
    assert len(list(source.documents(ReadOptions()))) == 8
    assert source.left_out == (f"{tmp_path}/e.parquet.gz", f"{tmp_path}/notes.md")


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    for folder in ("linked", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "linked" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    (tmp_path / "linked" / "part2").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to("../../linked")
    (tmp_path / "linked" / "itself").symlink_to(".")
    assert read(tmp_path / "linked") == ["a", "b"]


def test_patterns(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b1.txt", "deep/a3.txt", "a[1].txt", "a4.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name)
    assert read(f"{tmp_path}/a?.txt") == ["a1.txt", "a2.txt"]
    assert read(f"{tmp_path}/**/a[0-9].txt") == ["a1.txt", "a2.txt", "deep/a3.txt"]
    assert read(f"{tmp_path}/a[1].txt") == ["a[1].txt"]  # a file of that very name
    assert find_sources([f"{tmp_path}/a*"])[0].left_out == (f"{tmp_path}/a4.md",)
    with pytest.raises(UserError, match="no file has such a name"):
        read(f"{tmp_path}/c*.txt")


def test_addresses_of_stores(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    rows = "".join(json.dumps({"text": f"{number} text"}) + "\n" for number in range(100))
    store.pipe({"/corpus/a.jsonl": rows.encode(), "/corpus/deep/b.jsonl.zst": zstandard(rows.encode()), "/corpus/.c.txt": b"x"})
    parquet.write_table(arrow.table({"text": ["p", "q"]}), tmp_path / "c.parquet")
    store.pipe("/corpus/c.parquet", (tmp_path / "c.parquet").read_bytes())
    texts = [f"{number} text" for number in range(100)]
    assert read("memory://corpus/a.jsonl") == texts
    assert read("memory://corpus") == [*texts, "p", "q", *texts]
    assert read("memory://corpus/**/*.jsonl*") == [*texts, *texts]
    with pytest.raises(UserError, match="memory://none: no such file or folder"):
        read("memory://none")
    with pytest.raises(UserError, match=r"--input nosuch://x: cannot be read: .*nosuch"):
        read("nosuch://x")


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder where it takes a name of the hub, which no test can reach."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {number}", "meta": {"id": number}} for number in range(5)]
        write(tmp_path / "set" / f"{split}.jsonl", "\n".join(map(json.dumps, rows)))
    for how in ("", "?streaming=yes", "?streaming=no"):
        assert read(f"hub:{tmp_path}/set{how}") == [f"train {number}" for number in range(5)]
    options = ReadOptions(id_field="meta.id", min_characters=100)
    (source,) = find_sources([f"hub:{tmp_path}/set?split=test"])
    places = [str(record.place) for piece in source.pieces(options) for record in source.read(piece, options)]
    assert places[1] == f"hub:{tmp_path}/set?split=test, row 2 (id 1)"
    for given, message in (
        (f"hub:{tmp_path}/set?split=dev", "cannot be read: .*dev"),
        ("hub:a/b?lang=en", "after a . only name, split, revision, streaming"),
        ("hub:a/b?streaming=maybe", "streaming is yes"),
    ):
        with pytest.raises(UserError, match=f"--input {re.escape(given)}: .*{message}"):
            read(given)


def test_damaged_columns(tmp_path: Path) -> None:
    table = arrow.table({"text": ["x" * 1000] * 1000})
    with ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    content = (tmp_path / "a.arrow").read_bytes()
    for size in (3, 100, len(content) // 2):
        with pytest.raises(UserError, match=r"a\.arrow: is (not a valid Arrow file, or is )?cut off"):
            read(write(tmp_path / "a.arrow", content[:size]))
