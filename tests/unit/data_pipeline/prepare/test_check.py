"""What `check` finds in folders whose files, ids, documents or counts are not what the manifest says."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.prepare.check import check_folders
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.dataset import TokenDataset


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    (folder / "text.txt").write_text("".join(f"line {number * 7919} of the text\n" for number in range(300)))
    prepare(PrepareOptions((str(folder / "text.txt"),), folder / "out", 300, split=(8, 1, 1), read=ReadOptions("line")))
    TokenDataset(folder / "out", "train", 16).prepare_range(0, 1)
    return folder / "out"


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "data")
    return tmp_path / "data"


def faults(folder: Path) -> list[str]:
    ((_, found),) = check_folders([folder])
    return found


def replace(folder: Path, name: str, content: bytes) -> None:
    """A file and what the manifest says of it, so that only its content can be wrong."""
    (folder / name).write_bytes(content)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    stem, _, kind = name.partition(".")
    record = manifest["token_counts"] if kind == "npy" else manifest["splits"][stem][kind]
    record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_folder(sound: Path) -> None:
    assert faults(sound) == []


def test_a_flipped_byte_in_any_file(sound: Path, folder: Path) -> None:
    names = [path.relative_to(sound) for path in sound.rglob("*") if path.suffix in (".bin", ".idx", ".npy", ".json")]
    assert len(names) == 12
    for name in names:
        content = bytearray((sound / name).read_bytes())
        if name.parts[0] == "manifest.json":
            continue
        content[-3] ^= 0x41
        (folder / name).write_bytes(content)
        found = faults(folder)
        (folder / name).write_bytes((sound / name).read_bytes())
        assert any(name.name.rpartition("-")[2] in fault for fault in found), name


def test_contents_that_the_hashes_do_not_give_away(sound: Path, folder: Path) -> None:
    ids = np.fromfile(sound / "train.bin", np.uint16)
    lengths = np.frombuffer((sound / "train.idx").read_bytes(), np.int32, 2, 34)
    high, unended = ids.copy(), ids.copy()
    high[[0, 5]] = 300
    unended[lengths[0] - 1] = 7
    index, moved = (sound / "train.idx").read_bytes(), lengths + np.array([1, -1], np.int32)
    for name, content, messages in (
        ("train.bin", high.tobytes(), ["2 ids outside the vocabulary of 300", "token_counts.npy does not count"]),
        ("train.bin", unended.tobytes(), ["1 documents do not end with id 0", "token_counts.npy does not count"]),
        (
            "train.idx",
            index[:34] + moved.tobytes() + index[42:],
            ["train.idx: documents do not"],
        ),
        ("train.idx", index[:-8] + bytes(8), ["train.idx: the bounds of its documents are not in order"]),
        ("train.idx", b"X" + index[1:], ["train.idx: is not of the kind or number"]),
        ("train.idx", index[:-8], ["train.idx: is cut off"]),
    ):
        replace(folder, name, content)
        found = faults(folder)
        shutil.rmtree(folder)
        shutil.copytree(sound, folder)
        assert len(found) == len(messages)
        assert all(message in fault for message, fault in zip(messages, found, strict=True))


def test_all_faults_of_all_folders(sound: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "valid.bin").unlink()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "test.idx").write_bytes(b"short")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    results = dict(check_folders([folder, tmp_path / "none", sound]))
    assert [fault.split()[0] for fault in results[folder][:2]] == ["tokenizer.json", "split"]
    text = "\n".join(results[folder])
    for part in ("split train has a share but is not there", "valid.bin is missing", "test.idx has 5 bytes instead of"):
        assert part in text
    assert results[tmp_path / "none"] == ["no such folder; launch/prepare.py makes one"]
    assert len(results[sound]) == 1
    assert results[sound][0].startswith("the disk has 0 MB left")


def test_indexes_of_packed_samples(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", 7, packing="best_fit")
    dataset.prepare_range(0, 1)
    assert "0 documents longer than a sample are split" not in dataset.packed()
    assert faults(folder) == []
    place = dataset.index_folder(0)
    arrays = {name: np.load(place / f"{name}.npy") for name in ("document", "start", "first")}
    many = int(np.argmax(np.diff(arrays["first"])))  # a sample of several pieces
    for name, number, value in (
        ("document", 3, arrays["document"][4]),
        ("start", 0, arrays["start"][0] + 7),
        ("first", many, arrays["first"][many] - 1 if many else 1),
        ("first", many + 1, arrays["first"][many + 1] + 1),
    ):
        wrong = arrays[name].copy()
        assert wrong[number] != value
        wrong[number] = value
        np.save(place / f"{name}.npy", wrong)
        (found,) = faults(folder)
        assert re.match(rf"index/{place.name}: (it takes a piece of a document twice|its \w+\.npy has ).*; delete ", found), (
            name
        )
        np.save(place / f"{name}.npy", arrays[name])
    assert faults(folder) == []
