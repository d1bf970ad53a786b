"""Sample numbers → tokens, and global batches dealt out to ranks."""

import errno
import fcntl
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from data_pipeline.folder import LOCK, hold
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read import dataset as module
from data_pipeline.read import sound
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader, ValidationLoader

LENGTH = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(f"line {number} of {number * 7919}" for number in range(150)))
    prepare(PrepareOptions((str(folder / "text.txt"),), folder / "out", 300, split=(8, 1, 1), read=ReadOptions("line")))
    return folder / "out"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("index")))


def open_train(folder: Path, epochs: int = 1, seed: int = 1) -> TokenDataset:
    dataset = TokenDataset(folder, "train", LENGTH, seed)
    dataset.prepare_range(0, epochs * dataset.samples_per_epoch)
    return dataset


def read_all(dataset: TokenDataset, epoch: int = 0) -> np.ndarray:
    count = dataset.samples_per_epoch
    return np.stack([dataset.sample(epoch * count + place) for place in range(count)])


def test_one_epoch_holds_each_label_once_and_no_padding(folder: Path) -> None:
    dataset = open_train(folder)
    samples = read_all(dataset)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    assert dataset.samples_per_epoch == (len(tokens) - 1) // LENGTH
    assert (samples.shape, samples.dtype) == ((dataset.samples_per_epoch, LENGTH + 1), np.int64)
    left = np.bincount(tokens, minlength=300) - np.bincount(samples[:, 1:].ravel(), minlength=300)
    assert left.min() >= 0  # no token is a label twice
    assert left.sum() == len(tokens) - LENGTH * len(samples) <= LENGTH  # only the first token and the rest are no labels


def test_same_number_same_tokens_for_every_instance_and_run_length(folder: Path) -> None:
    short, long = open_train(folder, epochs=1), open_train(folder, epochs=3)
    np.testing.assert_array_equal(read_all(short), read_all(long))
    late = TokenDataset(folder, "train", LENGTH, seed=1)
    late.prepare_range(2 * late.samples_per_epoch, 3 * late.samples_per_epoch)
    np.testing.assert_array_equal(read_all(late, 2), read_all(long, 2))


def test_another_epoch_or_seed_is_another_order(folder: Path) -> None:
    dataset = open_train(folder, epochs=2)
    orders = [read_all(data, epoch) for data in (dataset, open_train(folder, epochs=2, seed=2)) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert not any(np.array_equal(order, other) for other in orders[:number])
    assert dataset.index_folder(1).name.endswith("-train-s16-seed1-epoch1")


def index_names(folder: Path) -> list[str]:
    return sorted(entry.name.split("-", 2)[2] for entry in (folder / "index").iterdir())


def test_only_the_indexes_of_the_last_epochs_stay_and_none_is_made_in_vain(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH, seed=1)
    size = dataset.samples_per_epoch  # a step is an epoch
    with TrainLoader(dataset, size, 1, 0, 1, steps=6) as loader:
        for step in range(6):
            tokens = torch.cat([batch.tokens for batch in loader.step(step)])
    assert index_names(folder) == ["s16-seed1-epoch4", "s16-seed1-epoch5"]
    again = TokenDataset(folder, "train", LENGTH, seed=1)
    again.prepare_range(5 * size, 6 * size)
    np.testing.assert_array_equal(tokens.numpy(), read_all(again, 5)[:, :-1])
    assert not any(str(dataset.index_folder(3)) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_an_index_that_another_run_reads_is_kept_until_it_is_done(folder: Path) -> None:
    first, second = open_train(folder), open_train(folder)
    size = first.samples_per_epoch
    first.prepare_range(size, 2 * size)
    assert index_names(folder) == ["s16-seed1-epoch0", "s16-seed1-epoch1"]
    second.prepare_range(size, 2 * size)
    assert index_names(folder) == ["s16-seed1-epoch1"]


def test_an_index_deleted_before_it_is_read_is_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = read_all(open_train(folder))
    calls = []

    def deleted_meanwhile(index: Path) -> object:
        calls.append(index)
        if len(calls) == 1:
            shutil.rmtree(index)
        return hold(index)

    monkeypatch.setattr(module, "hold", deleted_meanwhile)
    np.testing.assert_array_equal(read_all(open_train(folder)), order)
    assert len(calls) == 2
    (calls[0] / LOCK).unlink()
    with pytest.raises(UserError, match=f"has no {LOCK}; delete it"):
        open_train(folder)


def test_a_file_system_without_locks_keeps_everything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    dataset = open_train(folder)
    dataset.prepare_range(dataset.samples_per_epoch, dataset.samples_per_epoch + 1)
    assert index_names(folder) == ["s16-seed1-epoch0", "s16-seed1-epoch1"]


def test_a_killed_index_build_is_not_taken_for_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_all(open_train(folder))
    shutil.rmtree(folder / "index")
    real_save, saved = np.save, []

    def die_at_the_second(*arguments: object, **named: object) -> None:
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt
        real_save(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "save", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        open_train(folder)
    monkeypatch.undo()
    assert list((folder / "index").iterdir()) == []
    # What a process leaves that had no time to tidy up.
    (folder / "index" / ".name.partial-0").mkdir()
    np.testing.assert_array_equal(read_all(open_train(folder)), whole)


def test_damaged_index_is_named_and_never_unpickled(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "attacked",)  # type: ignore[return-value]

    index = open_train(folder).index_folder(0)
    array = next(index.glob("*shuffle_index.npy"))
    content = array.read_bytes()
    for bad in (pickle.dumps(Attack()), content[:-4], content[:20], b""):
        array.write_bytes(bad)
        with pytest.raises(UserError, match="is damaged; delete it, it is built again"):
            open_train(folder)
    array.unlink()
    with pytest.raises(UserError, match="is damaged; delete it"):
        open_train(folder)
    assert not (tmp_path / "attacked").exists()


def test_index_that_cannot_be_written(folder: Path) -> None:
    (folder / "index").write_text("a file where a folder must be")
    with pytest.raises(UserError, match=r"index/.*cannot be written: .*must be writable"):
        open_train(folder)


def test_damaged_token_files(folder: Path) -> None:
    index = (folder / "train.idx").read_bytes()
    for bad in (b"X" + index[1:], index[:34] + b"\1\0\0\0" + index[38:]):
        (folder / "train.idx").write_bytes(bad)
        with pytest.raises(UserError, match=r"train\.idx is damaged"):
            open_train(folder)
    (folder / "train.idx").write_bytes(index)
    (folder / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"train\.bin has 2 bytes"):
        open_train(folder)


def test_files_that_change_while_a_run_reads_them(folder: Path) -> None:
    """To touch a page of a mapped file that is not there any more would kill the process by SIGBUS."""
    dataset, held_out = open_train(folder), ValidationLoader(TokenDataset(folder, "valid", LENGTH), None, 2, 0, 1)
    with TrainLoader(dataset, 4, 2, 0, 1, steps=9) as loader:
        loader.step(0)
        (folder / "train.bin").write_bytes(b"")
        with pytest.raises(
            UserError, match=r"train\.bin: was changed while the run reads it, it has 0 bytes instead of \d+; put"
        ):
            loader.step(1)
    (folder / "valid.idx").unlink()
    with pytest.raises(UserError, match=r"valid\.idx: cannot be read any more: No such file"):
        list(held_out)


def test_flipped_bytes_and_ids_outside_the_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are hashed; of large ones, which only `launch/prepare.py check` hashes, ids are looked at here and there."""
    for name in ("train.bin", "train.idx"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        with pytest.raises(UserError, match=rf"{name} is damaged \(its sha256 differs"):
            open_train(folder)
        (folder / name).write_bytes(content)
    open_train(folder)
    monkeypatch.setattr(sound, "HASHED_BYTES", 0)
    monkeypatch.setattr(sound, "PLACE", 50)
    monkeypatch.setattr(sound, "PLACES", 4)
    open_train(folder)
    ids = np.fromfile(folder / "train.bin", np.uint16)
    for place in (0, ids.size - 2):
        bad = ids.copy()
        bad[place] = 300
        bad.tofile(folder / "train.bin")
        with pytest.raises(UserError, match=r"train\.bin is damaged \(it has ids outside the vocabulary of 300"):
            open_train(folder)


def test_too_long_samples_and_unknown_split(folder: Path) -> None:
    with pytest.raises(UserError, match="too few for one sample"):
        TokenDataset(folder, "valid", 10**6)
    with pytest.raises(UserError, match="has no split held_out; it has train, valid, test"):
        TokenDataset(folder, "held_out", LENGTH)


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_samples(folder: Path, length: int) -> None:
    dataset = TokenDataset(folder, "valid", length)
    dataset.prepare_range(0, 1)
    assert read_all(dataset).shape == (dataset.samples_per_epoch, length + 1)


def test_every_number_of_ranks_sees_the_same_global_batch(folder: Path) -> None:
    dataset = open_train(folder)
    steps = dataset.samples_per_epoch // 8 + 2  # over the end of the epoch
    expected = None
    for ranks in (1, 2, 4):
        loaders = [TrainLoader(dataset, 8, 2, rank, ranks, steps) for rank in range(ranks)]
        seen = []
        for step in range(steps):
            by_rank = [loader.step(step) for loader in loaders]
            seen += [by_rank[rank][m].tokens for m in range(8 // (2 * ranks)) for rank in range(ranks)]
        for loader in loaders:
            loader.close()
        joined = torch.cat(seen)
        expected = joined if expected is None else expected
        assert torch.equal(joined, expected)
    assert expected is not None
    assert expected.shape == (8 * steps, LENGTH)
    assert np.array_equal(expected[5].numpy(), dataset.sample(5)[:-1])


def test_batches_are_shifted_by_one_and_steps_may_jump(folder: Path) -> None:
    with TrainLoader(open_train(folder), 4, 2, 0, 1, steps=501) as loader:
        first = loader.step(0)
        batch = first[1]
        assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
        assert batch.tokens.is_contiguous()
        assert batch.labels.is_contiguous()
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        loader.step(500)
        assert torch.equal(loader.step(0)[1].labels, batch.labels)


def test_batches_for_a_gpu_are_pinned_where_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, str]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((tensor.data_ptr(), threading.current_thread().name))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with TrainLoader(open_train(folder), 4, 2, 0, 1, steps=1) as loader:
        loader.step(0)
        assert pinned == []
    with TrainLoader(open_train(folder), 4, 2, 0, 1, steps=1, pin_memory=True) as loader:
        expected = [part.data_ptr() for batch in loader.step(0) for part in (batch.tokens, batch.labels)]
    assert [pointer for pointer, _ in pinned] == expected
    assert all(name.startswith("data") for _, name in pinned), "the loop would wait for it"


def test_an_error_while_reading_ahead_surfaces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_train(folder)
    with TrainLoader(dataset, 4, 2, 0, 1, steps=9) as loader:
        loader.step(0)
        loader.step(1)

        def fail(number: int) -> np.ndarray:
            raise OSError("disk gone")

        monkeypatch.setattr(dataset, "sample", fail)
        with pytest.raises(OSError, match="disk gone"):
            loader.step(7)


@pytest.mark.parametrize(("ranks", "samples"), [(1, 7), (2, 7), (4, 3), (3, None), (2, 10**9)])
def test_validation_counts_every_sample_once_on_any_number_of_ranks(folder: Path, ranks: int, samples: int | None) -> None:
    dataset = TokenDataset(folder, "valid", LENGTH)
    loaders = [ValidationLoader(dataset, samples, 2, rank, ranks) for rank in range(ranks)]
    wanted = min(samples or dataset.samples_per_epoch, dataset.samples_per_epoch)
    batches = [list(loader) for loader in loaders]
    assert {len(part) for part in batches} == {len(loaders[0])}
    counted = [
        tuple(row)
        for part in zip(*batches, strict=True)
        for batch in part
        for row, weight in zip(batch.tokens.tolist(), batch.weights.tolist(), strict=True)
        if any(weight)
    ]
    assert counted == [tuple(dataset.sample(number)[:-1].tolist()) for number in range(wanted)]
    assert all(batch.tokens.shape == (2, LENGTH) for part in batches for batch in part)
