"""What is found in damaged indices of epochs, whole and by a sample; and that sound ones pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from megatron.core import __version__

from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read import sound
from data_pipeline.read.bounds import Bounds
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.orders import order_faults
from data_pipeline.read.sound import every, sampled

LENGTH = 16


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of both kinds, of the same documents; some are longer than a sample."""
    folder = tmp_path_factory.mktemp("orders")
    lines = (f"line {number} " + f"{number * 7919} " * (number % 20) for number in range(400))
    (folder / "text.txt").write_text("\n".join(lines))
    prepare(PrepareOptions((str(folder / "text.txt"),), folder / "out", 300, split=(1, 0, 0), read=ReadOptions("line")))
    places = {}
    for packing in ("concatenate", "best_fit"):
        dataset = TokenDataset(folder / "out", "train", LENGTH, packing=packing)
        dataset.prepare_range(0, 1)
        places[packing] = dataset.index_folder(0)
    return places


def lengths_of(place: Path) -> np.ndarray:
    index = place.parent.parent / "train.idx"
    return Bounds.of(index, 400).lengths


def test_sound_indices_pass_whole_and_by_a_sample(indices: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (4096, 7):
        monkeypatch.setattr(sound, "PLACE", size)
        for place in indices.values():
            for places in (every, sampled):
                assert list(order_faults(place, lengths_of(place), places)) == []


def test_a_sample_has_both_ends_and_no_entry_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "PLACE", 5)
    for size in (0, 1, 320, 321, 7919):
        seen = np.concatenate([np.arange(size)[place] for place in sampled(size)] or [np.arange(0)])
        assert len(np.unique(seen)) == len(seen) == min(size, 320)
        assert size == 0 or (seen[0], seen[-1]) == (0, size - 1)


def twice(array: np.ndarray) -> None:
    array[3] = array[4]


def far(array: np.ndarray) -> None:
    array[3] = 2**30


def later(array: np.ndarray) -> None:
    array[3, 1] += 1


def shifted(array: np.ndarray) -> None:
    array[3] += 1


DAMAGE: list[tuple[str, str, Callable[[np.ndarray], None], str]] = [
    ("concatenate", "document_index", twice, "its document_index.npy does not take everything once"),
    ("concatenate", "shuffle_index", twice, "its shuffle_index.npy does not take everything once"),
    ("concatenate", "shuffle_index", far, "its shuffle_index.npy does not take everything once"),
    ("concatenate", "sample_index", later, "its sample_index.npy has samples that do not follow each other"),
    ("concatenate", "sample_index", far, "its sample_index.npy has samples that do not follow each other"),
    ("best_fit", "document", far, "its document.npy has numbers of no document"),
    ("best_fit", "start", shifted, "its start.npy has places where no piece begins"),
    ("best_fit", "first", far, "its first.npy has samples that hold more than their length, or nothing"),
    ("best_fit", "first", twice, "its first.npy has samples that hold more than their length, or nothing"),
]


@pytest.mark.parametrize(("packing", "array", "damage", "reason"), DAMAGE)
def test_damage_is_named(
    indices: dict[str, Path], tmp_path: Path, packing: str, array: str, damage: Callable[[np.ndarray], None], reason: str
) -> None:
    place = shutil.copytree(indices[packing], tmp_path / indices[packing].name)
    (path,) = place.glob(f"*{array}.npy" if packing == "concatenate" else f"{array}.npy")
    content = np.load(path)
    damage(content)
    np.save(path, content)
    assert list(order_faults(place, lengths_of(indices[packing]), sampled)) == [reason]


def test_a_piece_twice_and_arrays_of_other_documents(indices: dict[str, Path], tmp_path: Path) -> None:
    place = shutil.copytree(indices["best_fit"], tmp_path / indices["best_fit"].name)
    lengths = lengths_of(indices["best_fit"])
    document, start = np.load(place / "document.npy"), np.load(place / "start.npy")
    short = np.flatnonzero((lengths[document] == lengths[document[0]]) & (start == start[0]))
    document[short[1]] = document[short[0]]
    np.save(place / "document.npy", document)
    assert list(order_faults(place, lengths, every)) == ["it takes a piece of a document twice"]
    for kind in indices.values():
        assert list(order_faults(kind, lengths[:-1], every)) == ["its arrays do not fit the documents"]
    (place / "first.npy").unlink()
    assert list(order_faults(place, lengths, every)) == ["it has the arrays document, start"]


def test_the_version_in_the_name_is_megatrons() -> None:
    assert version("megatron-core") == __version__  # by which indices were named that exist
