"""Copies from and to a file system, memory and an object store: complete, verified, or no checkpoint at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from pretrain.checkpoints.folder import newest_checkpoint
from pretrain.checkpoints.storage import Place, RemotePath, place, sizes
from pretrain.checkpoints.tools import copy as copying
from pretrain.checkpoints.tools.copy import copy
from pretrain.checkpoints.tools.diff import diff
from pretrain.checkpoints.tools.listing import list_checkpoints
from pretrain.checkpoints.tools.merge import merge
from pretrain.checkpoints.tools.show import show_list, show_tensor
from pretrain.checkpoints.tools.verify import find_checkpoint, verify_all
from pretrain.checkpoints.tools.words import size_words
from tests.helpers import run
from tests.s3 import s3_server
from tests.unit.pretrain.checkpoints.layouts import values, write_checkpoint

FILE = "engine/rank_00001.safetensors"
_numbers = count()


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with s3_server("bucket") as variables:
        yield variables


@pytest.fixture
def s3(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty folder."""
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{next(_numbers)}"


@pytest.fixture
def new_client() -> Iterator[Callable[[], None]]:
    """Makes s3fs read its environment variables again, which it does once."""
    import s3fs

    clear: Callable[[], None] = s3fs.S3FileSystem.clear_instance_cache
    clear()
    yield clear
    clear()


@pytest.fixture(params=["path", "file", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind, as a user names it."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return {"path": "", "file": "file://"}.get(request.param, f"memory://{next(_numbers)}") + str(tmp_path / "base")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", "tensor on 2", values())


def contents(folder: Place) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sizes(folder)}


def test_there_and_back_again(base: str, source: Path, tmp_path: Path) -> None:
    there = place(f"{base}/checkpoints/step_00000003")
    copy(source, there, overwrite=False)
    assert contents(there) == contents(source)
    back = tmp_path / "back"
    copy(find_checkpoint(base), back, overwrite=False)  # as the newest checkpoint of a run's folder
    assert contents(back) == contents(source)
    assert sorted(path.name for path in tmp_path.iterdir() if "back" in path.name) == ["back"]


def test_the_other_commands_read_any_place(base: str, source: Path, tmp_path: Path) -> None:
    there = place(f"{base}/checkpoints/step_00000003")
    copy(source, there, overwrite=False)
    (row,) = list_checkpoints(place(base))
    assert (row.name, row.step, row.status, row.layout) == (
        "step_00000003",
        3,
        "complete",
        "2 ranks, DP 2, deepspeed ZeRO 1, fp32",
    )
    assert row.bytes == sum(sizes(source).values())
    assert row.written is not None
    assert verify_all(there) == verify_all(source)
    assert diff(source, there, None) == []
    assert show_list(there) == show_list(source)
    assert show_tensor(there, "model/embedding", "4:9") == show_tensor(source, "model/embedding", "4:9")
    merged = merge([there, source], [1.0, 1.0], tmp_path / "merged")
    shown = [show_tensor(folder, "model/down", ":").partition("\n\n")[2] for folder in (merged, source)]
    assert shown[0] == shown[1]


def test_what_is_there_is_not_overwritten_unless_told(base: str, source: Path, tmp_path: Path) -> None:
    target = place(f"{base}/copy")
    copy(source, target, overwrite=False)
    other = write_checkpoint(tmp_path / "other", "unsharded", values(), step=9)
    with pytest.raises(UserError, match=r"copy: already .*--overwrite replaces it"):
        copy(other, target, overwrite=False)
    assert contents(target) == contents(source)
    copy(other, target, overwrite=True)
    assert contents(target) == contents(other)


def test_a_folder_with_other_files_is_left_alone(base: str, source: Path) -> None:
    target = place(f"{base}/copy")
    if isinstance(target, RemotePath):
        (target / "notes.txt").write([b"mine"], 4)
    else:
        target.mkdir(parents=True)
        (target / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"copy: already exists.*; name a new folder"):
            copy(source, target, overwrite)
    assert contents(target) == {"notes.txt": b"mine"}


def test_an_interrupted_copy_is_no_checkpoint(base: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on a file system; in a storage files without a marker, which the same command completes."""
    target = place(f"{base}/copy")
    record_of = copying.record_of

    def stops(file: Place, size: int, advance: Callable[[int], object]) -> Any:
        if file.name == "tokenizer.json":
            raise KeyboardInterrupt
        return record_of(file, size, advance)

    with monkeypatch.context() as patch:
        patch.setattr(copying, "record_of", stops)
        with pytest.raises(KeyboardInterrupt):
            copy(source, target, overwrite=False)
    assert not (target / "complete.json").exists()
    left = sizes(target) if target.is_dir() else {}
    assert bool(left) == isinstance(target, RemotePath)
    if isinstance(target, RemotePath):
        with pytest.raises(UserError, match=r"copy: not a complete checkpoint of manyheads \(no complete.json\)"):
            find_checkpoint(f"{base}/copy")
    copy(source, target, overwrite=False)
    assert contents(target) == contents(source)


def test_a_damaged_source_leaves_nothing_that_is_complete(base: str, source: Path) -> None:
    content = bytearray((source / FILE).read_bytes())
    content[-1] ^= 1
    (source / FILE).write_bytes(content)
    target = place(f"{base}/copy")
    with pytest.raises(UserError, match=f"{source / FILE}: its content is not what was written"):
        copy(source, target, overwrite=False)
    assert not (target / "complete.json").exists()


def test_what_arrives_otherwise_is_found(base: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = copying._checked

    def loses(file: Place, *arguments: Any) -> Iterator[bytes]:
        for piece in checked(file, *arguments):
            yield piece if file.name != "rank_00001.safetensors" else bytes(len(piece))

    monkeypatch.setattr(copying, "_checked", loses)
    target = place(f"{base}/copy")
    with pytest.raises(UserError, match=r"copy.*rank_00001.safetensors: was not written as it was read"):
        copy(source, target, overwrite=False)
    assert not (target / "complete.json").exists()


def test_a_checkpoint_is_not_copied_onto_itself(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(UserError, match="is the checkpoint itself"):
            copy(source, target, overwrite=True)
    assert verify_all(source)[0] == []


def test_a_full_file_system(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="copy: needs 1 MB, its file system has 1 MB left"):
        copy(source, tmp_path / "copy", overwrite=False)
    with pytest.raises(UserError, match="/proc/none/copy: cannot be written"):
        copy(source, Path("/proc/none/copy"), overwrite=False)


def test_an_overwritten_checkpoint_in_a_storage_keeps_strangers_files(source: Path, tmp_path: Path) -> None:
    target = place(f"memory://{next(_numbers)}/copy")
    assert isinstance(target, RemotePath)
    copy(source, target, overwrite=False)
    (target / "notes.txt").write([b"mine"], 4)
    other = write_checkpoint(tmp_path / "other", "unsharded", values(), step=9)
    copy(other, target, overwrite=True)
    assert contents(target) == {**contents(other), "notes.txt": b"mine"}


def test_what_a_store_refuses_is_one_line(
    store: dict[str, str], s3: str, source: Path, new_client: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    def refused(*messages: str) -> None:
        new_client()
        for work in (
            lambda: copy(source, place(f"{s3}/copy"), overwrite=False),
            lambda: find_checkpoint(s3),
            lambda: list_checkpoints(place(s3)),
        ):
            with pytest.raises(UserError) as caught:
                work()
            assert str(caught.value).startswith("s3://")
            assert any(message in str(caught.value) for message in messages), caught.value
            assert "\n" not in str(caught.value)

    address = store["AWS_ENDPOINT_URL"]
    with pytest.raises(UserError, match=r"^s3://nowhere/copy: .*The specified bucket does not exist"):
        copy(source, place("s3://nowhere/copy"), overwrite=False)
    with pytest.raises(UserError, match=r"^s3://nowhere/run: .*The specified bucket does not exist"):
        list_checkpoints(place("s3://nowhere/run"))
    requests.post(f"{address}/moto-api/reset-auth", data="0", timeout=30)  # from now on keys are checked
    try:
        refused("AWS Access Key Id you provided does not exist", "Forbidden")
    finally:
        requests.post(f"{address}/moto-api/reset-auth", data="inf", timeout=30)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    refused("Unable to locate credentials")


@pytest.mark.usefixtures("new_client")
def test_a_server_that_is_gone(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"^s3://bucket/.*: Could not connect") as caught:
        newest_checkpoint(place(s3))
    assert "\n" not in str(caught.value)


def test_the_command_copies_to_a_store(store: dict[str, str], s3: str, source: Path) -> None:
    size = sum(sizes(source).values()) - (source / "complete.json").stat().st_size
    result = run(["launch/checkpoint.py", "copy", str(source), f"{s3}/copy"], variables=store)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"written {s3}/copy: 6 files, {size_words(size)}\n"
    assert contents(place(f"{s3}/copy")) == contents(source)
