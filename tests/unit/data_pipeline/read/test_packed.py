"""Samples of best-fit packing to the token, and the index that they are read from."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from data_pipeline.faults import data_faults
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.sources import ReadOptions
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.packed import samples_per_epoch

END, LENGTHS = 0, (1, 5, 16, 40)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [" ".join(str(number * step) for step in range(1, 2 + number**2 % 29)) for number in range(150)]
    (folder / "text.txt").write_text("\n".join(lines))
    prepare(PrepareOptions((str(folder / "text.txt"),), folder / "out", 300, split=(8, 1, 1), read=ReadOptions("line")))
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("index")))


def open_packed(folder: Path, length: int, epochs: int = 1, split: str = "train") -> TokenDataset:
    dataset = TokenDataset(folder, split, length, seed=1, packing="best_fit")
    dataset.prepare_range(0, epochs * dataset.samples_per_epoch)
    return dataset


def read_all(dataset: TokenDataset, epoch: int = 0) -> np.ndarray:
    count = dataset.samples_per_epoch
    return np.stack([dataset.sample(epoch * count + place) for place in range(count)])


def documents(folder: Path, split: str = "train") -> list[list[int]]:
    """The token file, split after each end."""
    tokens = np.fromfile(folder / f"{split}.bin", np.uint16).tolist()
    ends = [place + 1 for place, token in enumerate(tokens) if token == END]
    return [tokens[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_each_token_once_and_each_but_the_first_of_a_document_as_a_label(
    folder: Path, length: int, epoch: int
) -> None:
    dataset, texts = open_packed(folder, length, epochs=2), documents(folder)
    assert max(map(len, texts)) > 40, "nothing would be split"
    samples = read_all(dataset, epoch)
    assert (samples.dtype, samples.shape[1]) == (np.int64, length + 1)
    inputs, labels = samples[:, :-1], samples[:, 1:]
    counted = inputs != END  # the objective's rule: what follows an end is no label
    pairs = Counter(zip(inputs[counted].tolist(), labels[counted].tolist(), strict=True))
    assert pairs == Counter(pair for text in texts for pair in pairwise(text))
    config = DataConfig(path=str(folder), sequence_length=length, packing="best_fit")
    assert samples_per_epoch(folder, config) == dataset.samples_per_epoch
    padding = dataset.samples_per_epoch * length - sum(map(len, texts))
    assert np.bincount(inputs.ravel()).tolist()[0] == len(texts) + padding
    assert f"{padding / inputs.size:.3%} padding" in dataset.packed()
    assert f"{sum(len(text) > length for text in texts)} documents longer than a sample are split" in dataset.packed()


def test_a_sample_holds_complete_documents(folder: Path) -> None:
    texts = {tuple(text) for text in documents(folder)}
    several = 0
    for sample in read_all(open_packed(folder, 40))[:, :-1].tolist():
        ends = [place + 1 for place, token in enumerate(sample) if token == END]
        parts = [tuple(sample[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        if ends and ends[-1] == 40:
            several += len(parts) > 1
        assert all(part in texts or part == (END,) or any(text[-len(part) :] == part for text in texts) for part in parts)
        assert len(ends) == 0 or ends[-1] == 40, "only a sample that one piece fills has no end"
    assert several > 5


def test_epochs_differ_and_an_epoch_is_the_same_again(folder: Path) -> None:
    first = read_all(open_packed(folder, 16, epochs=2), 1)
    shutil.rmtree(folder / "index")
    again = open_packed(folder, 16, epochs=2)
    np.testing.assert_array_equal(read_all(again, 1), first)
    assert not np.array_equal(read_all(again, 0), first)


def test_packed_and_concatenated_samples_have_indexes_of_their_own(folder: Path) -> None:
    packed, plain = open_packed(folder, 16), TokenDataset(folder, "train", 16, seed=1)
    plain.prepare_range(0, 1)
    assert packed.index_folder(0) != plain.index_folder(0)
    assert plain.packed().endswith("tokens are left out")


@pytest.mark.parametrize("array", ["document", "start", "first"])
def test_a_damaged_index_is_named(folder: Path, array: str) -> None:
    path = open_packed(folder, 16).index_folder(0) / f"{array}.npy"
    content = np.load(path)
    np.save(path, content[:-1])
    with pytest.raises(UserError, match="is damaged; delete it, it is built again"):
        open_packed(folder, 16)
    path.unlink()
    with pytest.raises(UserError, match="is damaged; delete it, it is built again"):
        open_packed(folder, 16)


def test_a_split_shorter_than_a_sample_is_one_padded_sample(folder: Path) -> None:
    sections = {"data": DataConfig(path=str(folder), sequence_length=10**6, packing="best_fit")}
    assert data_faults(sections) == []
    assert data_faults({"data": sections["data"].model_copy(update={"packing": "documents"})})
    dataset = open_packed(folder, 10**5, split="valid")
    assert dataset.samples_per_epoch == 1
    assert (dataset.sample(0) != END).sum() == sum(len(text) - 1 for text in documents(folder, "valid"))


def test_the_documents_of_a_sample_are_named(folder: Path) -> None:
    dataset, texts = open_packed(folder, 40), documents(folder)
    several = 0
    for number in range(dataset.samples_per_epoch):
        named, inputs = dataset.documents(number), dataset.sample(number)[:-1].tolist()
        several += len(named) > 1
        if inputs[-1] == END:  # else a part of one that goes on
            pieces = [texts[place][-(len(texts[place]) % 40 or 40) :] for place in named]
            filled = [token for piece in pieces for token in piece]
            assert inputs == filled + [END] * (40 - len(filled))
        else:
            assert any(texts[named[0]][start : start + 40] == inputs for start in range(0, len(texts[named[0]]), 40))
    assert several > 5
