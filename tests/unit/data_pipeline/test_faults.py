"""Faults of validation sets, which are found before a run starts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.schema import DataConfig, ModelConfig, RunConfig, Section, SourceConfig, ValidationConfig
from data_pipeline.faults import data_faults
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read import sound
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.manifest import read_manifest
from tests.helpers import write_text_files


def faults(data: Path, **sets: Path) -> list[tuple[str, str]]:
    """Key and reason of each fault of a run with these validation sets."""
    named = {name: str(path) for name, path in sets.items()}
    sections: dict[str, Section] = {
        "data": DataConfig(path=str(data), sequence_length=16),
        "validation": ValidationConfig(sets=named),
    }
    found = data_faults(sections)
    assert all(fault.value == named.get(fault.key.rpartition(".")[2], str(data)) for fault in found)
    return [(fault.key, fault.allowed) for fault in found]


@pytest.fixture
def others(tmp_path: Path, prepared: Path) -> dict[str, Path]:
    """Folders that were prepared from other text: with the run's tokenizer, with one of their own, and without the split."""
    texts = str(write_text_files(tmp_path / "texts", documents=12, seed=1))
    tokenizer = prepared / "tokenizer.json"
    made = {"good": ((0, 1, 0), tokenizer), "foreign": ((1, 1, 0), None), "unsplit": ((1, 0, 0), tokenizer)}
    for name, (split, given) in made.items():
        size = {"vocab_size": 290} if given is None else {}
        prepare(PrepareOptions(inputs=(texts,), output=tmp_path / name, split=split, tokenizer=given, **size))  # type: ignore[arg-type]
    return {name: tmp_path / name for name in made}


def test_a_set_needs_no_training_text_and_the_data_then_no_validation_text(others: dict[str, Path]) -> None:
    assert faults(others["unsplit"], wiki=others["good"]) == []
    assert [key for key, _ in faults(others["unsplit"])] == ["data.path"]


def test_every_fault_of_every_set_is_listed(tmp_path: Path, prepared: Path, others: dict[str, Path]) -> None:
    tokens = read_manifest(others["good"]).splits["valid"].tokens
    (tmp_path / "short.txt").write_text("few words")
    given = prepared / "tokenizer.json"
    prepare(PrepareOptions((str(tmp_path / "short.txt"),), tmp_path / "short", tokenizer=given, split=(0, 1, 0)))
    few = read_manifest(tmp_path / "short").splits["valid"].tokens
    truncated = shutil.copytree(others["good"], tmp_path / "truncated")
    (truncated / "valid.bin").write_bytes(b"")
    assert tokens > 16 >= few
    found = faults(prepared, none=tmp_path / "none", **others, short=tmp_path / "short", truncated=truncated)
    expected = {
        "none": "no such folder; launch/prepare.py makes one",
        "foreign": f"prepared with another tokenizer than {prepared}; prepare it with --tokenizer {prepared}/tokenizer.json",
        "unsplit": "has no documents in split valid; give it a share in --split of launch/prepare.py",
        "short": f"its split valid has {few} tokens, too few for data.sequence_length (16) + 1; prepare more text",
        "truncated": f"valid.bin has 0 bytes instead of {2 * tokens}, so it is truncated; "
        "copy it again or run launch/prepare.py",
    }
    assert found == [(f"validation.sets.{name}", reason) for name, reason in expected.items()]


def test_sets_are_checked_where_the_data_is_missing(tmp_path: Path, others: dict[str, Path]) -> None:
    found = faults(tmp_path / "data", unsplit=others["unsplit"], good=others["good"])
    assert [key for key, _ in found] == ["data.path", "validation.sets.unsplit"]


def test_a_short_set_is_enough_where_samples_are_filled_up(tmp_path: Path, prepared: Path, others: dict[str, Path]) -> None:
    tokens = read_manifest(others["good"]).splits["valid"].tokens
    for packing, keys in {"documents": ["validation.sets.wiki"], "best_fit": []}.items():
        data = DataConfig(path=str(prepared), sequence_length=tokens, packing=packing)  # type: ignore[arg-type]
        found = data_faults({"data": data, "validation": ValidationConfig(sets={"wiki": str(others["good"])})})
        assert [fault.key for fault in found if fault.key.startswith("validation")] == keys


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_damage_in_any_file_of_any_folder_is_said_at_once(tmp_path: Path, prepared: Path) -> None:
    """Each source has one fault; hashes tell the first four, the content the others."""
    names = ("train.bin", "train.idx", "token_counts.npy", "valid.bin", "index", "ids", "ends")
    for number, name in enumerate(names):
        text = write_text_files(tmp_path / f"text{number}", documents=30, seed=number + 2)
        given = prepared / "tokenizer.json"
        prepare(PrepareOptions((str(text),), tmp_path / name, tokenizer=given, split=(8, 2, 0)))
    for name in names[:4]:
        flip(tmp_path / name / name)
    order = TokenDataset(tmp_path / "index", "train", 16, seed=1234)
    order.prepare_range(0, 1)
    (array,) = order.index_folder(0).glob("*shuffle_index.npy")
    flip(array, at=-8)
    vocab_size = read_manifest(prepared).vocab_size
    for name, place, value in (("ids", 3, vocab_size), ("ends", -1, 5)):
        ids = np.fromfile(tmp_path / name / "train.bin", np.uint16)
        ids[place] = value
        write_anew(tmp_path / name, "train.bin", ids)

    data = DataConfig(sources=[SourceConfig(path=str(tmp_path / name), weight=1) for name in names], sequence_length=16)
    again = "copy it again or run launch/prepare.py"
    expected = [f"{name} is damaged (its sha256 differs from that in manifest.json); {again}" for name in names[:4]]
    expected += [
        f"train.bin is damaged (it has ids outside the vocabulary of {vocab_size}); {again}",
        f"train.bin is damaged (documents do not end with id 0); {again}",
        (
            f"index/{order.index_folder(0).name} is damaged (its shuffle_index.npy does not take everything once); "
            "delete it, it is built again"
        ),
    ]
    found = data_faults({"data": data, "run": RunConfig(folder="runs/a")})
    assert [fault.allowed for fault in found] == expected
    assert [fault.key for fault in found] == [f"data.sources[{number}].path" for number in (0, 1, 2, 3, 5, 6, 4)]
    other_order = data_faults({"data": data, "run": RunConfig(folder="runs/a", seed=1)})
    assert [fault.allowed for fault in other_order] == expected[:-1]  # an index that the run does not read is left alone


def write_anew(folder: Path, name: str, ids: np.ndarray) -> None:
    """A token file with other content and its hash in the manifest."""
    ids.tofile(folder / name)
    tree = json.loads((folder / "manifest.json").read_text())
    stem, _, kind = name.partition(".")
    tree["splits"][stem][kind]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_large_files_are_sampled(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file is too large to be hashed, the ends of it and places between are looked at."""
    monkeypatch.setattr(sound, "HASHED_BYTES", 0)
    monkeypatch.setattr(sound, "PLACE", 3)
    folder = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    documents = read_manifest(folder).splits["train"].documents
    header, untouched = 34, (folder / "train.idx").read_bytes()
    assert documents > 3
    assert faults(folder) == []
    for at, reason in (
        (0, "is not of the kind or number of documents that the manifest says"),
        (header, "the lengths of its documents do not add up"),
        (header + 4 * documents + 8, "documents do not begin where the one before ends"),
        (header + 12 * documents + 8, "the bounds of its documents are not in order"),
    ):
        flip(folder / "train.idx", at)
        ((key, found),) = faults(folder)
        assert key == "data.path"
        assert found.startswith("train.idx is damaged (")
        assert reason in found
        (folder / "train.idx").write_bytes(untouched)


def test_room_for_the_order_of_samples(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders on one disk need it together, and an order that exists needs no more."""
    folder = shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("index"))
    sections: dict[str, Section] = {
        "data": DataConfig(path=str(folder), sequence_length=16),
        "run": RunConfig(folder="runs/a", seed=3),
    }
    record = read_manifest(folder).splits["train"]
    dataset = TokenDataset(folder, "train", 16, seed=3)
    dataset.prepare_range(0, 1)
    written = sum(path.stat().st_size - 128 for path in dataset.index_folder(0).glob("*.npy"))
    dataset.release()
    needed = 4 * record.documents + 12 * record.samples(16)
    assert needed <= written <= needed + 8  # sample_index has one row more than samples
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, needed))
    ((key, reason),) = [(fault.key, fault.allowed) for fault in data_faults(sections)]  # there is a split valid, too
    assert key == "data.path"
    assert re.fullmatch(r"its disk has \d\.\d MB left, the order of samples in index/ needs \d\.\d MB; free some", reason)
    TokenDataset(folder, "valid", 16).prepare_range(0, 1)
    assert data_faults(sections) == []


@pytest.mark.parametrize(("end", "count"), [(None, 0), (0, 0), (5, 1)])
def test_documents_end_where_the_tokenizer_says(prepared: Path, end: int | None, count: int) -> None:
    """A run's config.yaml has the end of its own tokenizer, and may be copied for other data."""
    assert read_manifest(prepared).end_of_document == 0
    model = ModelConfig(attention="mha", hidden_size=16, num_layers=2, num_heads=2, end_of_document=end)
    sections = {"data": DataConfig(path=str(prepared), sequence_length=16, packing="documents"), "model": model}
    found = [(fault.key, fault.value, fault.allowed) for fault in data_faults(sections)]
    assert found == [("model.end_of_document", 5, "the tokenizer's (0), or null")] * count
