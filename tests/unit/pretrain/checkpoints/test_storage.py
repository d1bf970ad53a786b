"""Places of checkpoints: what an address names, and files that are read in ranges."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.checkpoints.folder import DamagedError, Marker, read_json
from pretrain.checkpoints.storage import RemotePath, is_url, local_path, pieces, place, read_range, size_of, sizes


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/a", "runs/a"),
        ("/runs/a", "/runs/a"),
        ("a:b/c", "a:b/c"),
        ("file:///runs/a", "/runs/a"),
        ("local:///runs/a", "/runs/a"),
        ("file://runs/a", "runs/a"),
        ("./memory:/a", "memory:/a"),
    ],
)
def test_what_is_on_a_file_system(text: str, path: str) -> None:
    assert not is_url(text)
    assert place(text) == local_path(text) == Path(path)


@pytest.mark.parametrize(("text", "shown"), [("memory://a/b/", "memory:///a/b"), ("simplecache::memory://a", "memory:///a")])
def test_what_is_in_a_storage(text: str, shown: str) -> None:
    found = place(text)
    assert isinstance(found, RemotePath)
    assert (str(found), str(found / "c/d"), (found / "c/d").name) == (shown, f"{shown}/c/d", "d")
    with pytest.raises(UserError, match="is not on a file system; `python "):
        local_path(text)


def test_a_storage_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^nonsense://a: no storage .*Protocol not known: nonsense"):
        place("nonsense://a")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"^s3://a/b: needs a package that is not installed \(Install s3fs to access S3\)"):
        place("s3://a/b")


@pytest.fixture(params=["path", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | RemotePath:
    """With files a (25 bytes) and b/c (no byte)."""
    content = bytes(range(25))
    if request.param == "memory":
        found = place(f"memory:/{tmp_path}")
        assert isinstance(found, RemotePath)
        (found / "a").write([content[:9], content[9:]], 25)
        (found / "b/c").write([], 0)
        return found
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c").touch()
    return tmp_path


def test_files(folder: Path | RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(folder) == {"a": 25, "b/c": 0}
    assert (size_of(folder / "a"), size_of(folder / "b"), size_of(folder / "none")) == (25, None, None)
    assert (folder.is_dir(), (folder / "a").is_file(), (folder / "a").is_dir(), (folder / "none").exists()) == (
        True,
        True,
        False,
        False,
    )
    assert sorted(found.name for found in folder.glob("*")) == ["a", "b"]
    assert [found.name for found in folder.glob("a*")] == ["a"]
    assert read_range(folder / "a", 3, 6) == bytes([3, 4, 5])
    assert read_range(folder / "a", 23, 99) == bytes([23, 24])
    monkeypatch.setattr("pretrain.checkpoints.storage._PIECE", 10)
    assert [len(piece) for piece in pieces(folder / "a", 25)] == [10, 10, 5]
    assert b"".join(pieces(folder / "a", 99)) == bytes(range(25))  # a file that has become shorter
    with pytest.raises(UserError, match=r"none: (does not exist|cannot be read \(No such file or directory\))$"):
        read_range(folder / "none", 0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "manyheads-checkpoint-1", "format": "manyheads-checkpoint-1", "files": {}}', "'format' is there twice"),
        (
            '{"format": "manyheads-checkpoint-1", "files": {"a": {"bytes": 1, "sha256": "", "bytes": 2}}}',
            "'bytes' is there twice",
        ),
        ("[" * 10_000, "is damaged"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "complete.json").write_text(text)
    with pytest.raises(DamagedError, match=rf"complete.json: .*{message}"):
        read_json(tmp_path / "complete.json", Marker)
