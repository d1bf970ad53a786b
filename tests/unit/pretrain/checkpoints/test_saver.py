"""Saving on one process: what `begin` keeps of a moment, what `finish` leaves, also where something fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.manifest import file_record
from pretrain.checkpoints import saver as module
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import TrainState, read_config, read_marker, read_state, verify
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import NotFiniteError, Part, State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from tests.helpers import write_run

write = module.write_parts


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


def make_saver(config: Config, **changes: Any) -> Saver:
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=changes)})
    return Saver(CheckpointStore(Path(config.run.folder)), Layout(), config, "d" * 64, "{}")


@pytest.fixture
def saver(config: Config) -> Iterator[Saver]:
    made = make_saver(config)
    yield made
    made.close()


def state_of(weights: torch.Tensor, step: float = 3.0) -> State:
    return State.unsharded({"model": {"w": weights}}, {"step": torch.tensor(step)})


def stored(folder: Path) -> list[float]:
    values: list[float] = Reader(folder / "engine").read("model", "w").tolist()
    return values


def names(saver: Saver) -> list[str]:
    return sorted(path.name for path in saver.store.folder.iterdir())


def test_a_checkpoint_has_the_state_of_its_beginning(saver: Saver) -> None:
    weights = torch.ones(3)
    for step in (1, 2):  # the second one is copied into the memory of the first one's copy
        saver.begin(step, state := state_of(weights * step, step))
        assert (saver.pending, saver.store.steps()) == (step, list(range(1, step)))
        state.parts[0].tensor.fill_(9.0)
        state.scalars["step"][0].fill_(9.0)
        torch.manual_seed(step)
        folder = saver.finish()
        assert saver.pending is None
        assert not saver.written
        verify(folder)
        assert stored(folder) == [step] * 3
        assert read_config(folder) == saver.config
        assert read_state(folder) == TrainState(step, 1, "d" * 64, {"step": step})
    assert (saver.store.folder / "latest").read_text() == "step_00000002\n"
    assert names(saver) == ["latest", "step_00000001", "step_00000002"]


def test_what_is_written_beside_the_state_is_vouched_for(saver: Saver) -> None:
    def more(folder: Path) -> list[Path]:
        (folder / "more.json").write_text("[1]")
        return [folder / "more.json"]

    saver.begin(1, state_of(torch.ones(3)), more)
    folder = saver.finish()
    assert read_marker(folder).files["more.json"] == file_record(folder / "more.json")
    assert sorted(read_marker(folder).files) == [
        "config.yaml",
        "engine/index.json",
        "engine/rank_00000.safetensors",
        "more.json",
        "state.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_state_is_copied_only_if_training_goes_on(
    config: Config, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the writing held back: a copy keeps the values of the beginning."""
    go_on, write = threading.Event(), module.write_parts
    monkeypatch.setattr(module, "write_parts", lambda *arguments, **options: go_on.wait() and write(*arguments, **options))
    saver, weights = make_saver(config, asynchronous=asynchronous), torch.ones(3)
    for waits in (False, True):
        go_on.clear()
        saver.begin(1, state_of(weights.fill_(1.0)), waits=waits)
        assert not saver.written
        weights.fill_(2.0)
        go_on.set()
        assert stored(saver.finish()) == [1.0 if asynchronous and not waits else 2.0] * 3
    saver.close()


def test_what_nothing_writes_into_is_not_copied(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Part] = []

    def noted(engine: Path, rank: int, parts: Sequence[Part], others: Any, only_finite: bool) -> Any:
        written.extend(parts)
        return write(engine, rank, parts, others, only_finite)

    monkeypatch.setattr(module, "write_parts", noted)
    fixed, other = (Part("w", kind, (3,), (0,), torch.ones(3), fixed=kind == "saved_1") for kind in ("saved_1", "model"))
    saver.begin(1, State([fixed, other], {}))
    folder = saver.finish()
    places = {part.kind: part.tensor.data_ptr() for part in written}
    assert places["saved_1"] == fixed.tensor.data_ptr()
    assert places["model"] != other.tensor.data_ptr()
    assert Reader(folder / "engine").index.kinds == {"saved_1", "model"}


def test_where_host_memory_holds_the_state_already_it_is_not_copied(config: Config) -> None:
    offloaded = config.model_copy(update={"parallel": config.parallel.model_copy(update={"cpu_offload": True})})
    assert [make_saver(config).asynchronous, make_saver(offloaded).asynchronous] == [True, False]
    assert [make_saver(offloaded, asynchronous=given).asynchronous for given in (True, False)] == [True, False]


def test_a_failed_save_leaves_the_older_one_and_nothing_else(saver: Saver) -> None:
    saver.begin(1, state_of(torch.ones(3)))
    old = saver.finish()

    def fails(folder: Path) -> list[Path]:
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    saver.begin(2, state_of(torch.ones(3)), fails)
    assert saver.written
    message = r"step_00000002: the checkpoint could not be saved .*No space left.*; .*step_00000001 is still complete"
    with pytest.raises(UserError, match=message):
        saver.finish()
    assert names(saver) == ["latest", "step_00000001"]
    verify(old)
    saver.begin(3, state_of(torch.ones(3)))
    assert saver.finish() == saver.store.path(3)


def test_a_folder_that_cannot_be_made(saver: Saver) -> None:
    saver.store.folder.parent.mkdir(exist_ok=True)
    saver.store.folder.touch()
    with pytest.raises(UserError, match=r"step_00000001: the checkpoint could not be saved \(.*there is no earlier one"):
        saver.begin(1, state_of(torch.ones(3)))
    saver.store.folder.unlink()
    saver.begin(1, state_of(torch.ones(3)))
    assert saver.finish() == saver.store.path(1)


def test_a_state_that_is_not_finite_is_not_saved(saver: Saver) -> None:
    saver.begin(1, state_of(torch.tensor([1.0, torch.nan])))
    with pytest.raises(NotFiniteError, match=r"^model/w is not finite$"):
        saver.finish()
    assert list(saver.store.folder.iterdir()) == []


def test_a_state_with_gaps_is_not_saved(saver: Saver) -> None:
    message = r"could not be saved \(the ranks' parts do not fit together: the parts of model/w do not"
    with pytest.raises(UserError, match=message):
        saver.begin(1, State([Part("w", "model", (3,), (1,), torch.ones(2))], {}))
    assert list(saver.store.folder.iterdir()) == []
    saver.begin(2, state_of(torch.ones(3)))  # the next one has an index of its own
    assert stored(saver.finish()) == [1.0] * 3


def test_a_file_system_that_cannot_even_be_listed_is_a_failed_save(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    saver.begin(1, state_of(torch.ones(3)))
    monkeypatch.setattr(saver.store, "put_in_place", stale)
    monkeypatch.setattr(saver.store, "steps", stale)
    with pytest.raises(
        UserError, match=r"could not be saved \(.*Stale file handle\); .* cannot be listed \(Stale file handle\)"
    ):
        saver.finish()
    saver.clear_old()


def test_a_state_that_no_run_can_use_is_said_before_a_full_disk(saver: Saver) -> None:
    outcomes = [module._Outcome(error=UserError("no room")), module._Outcome(error=NotFiniteError("model/w is not finite"))]
    with pytest.raises(NotFiniteError):
        saver._put_in_place(TrainState(1, 2, "d" * 64), outcomes)


def test_the_index_follows_a_state_whose_parts_change(saver: Saver) -> None:
    for step, size in ((1, 3), (2, 5), (3, 5)):
        saver.begin(step, state_of(torch.ones(size)))
        assert stored(saver.finish()) == [1.0] * size


def test_a_fault_of_the_program_is_raised_as_it_is(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **options: object) -> None:
        raise ValueError("two tensors have one name")

    monkeypatch.setattr(module, "write_parts", fault)
    saver.begin(1, state_of(torch.ones(3)))
    with pytest.raises(ValueError, match="two tensors have one name"):
        saver.finish()


def test_copies_lie_in_one_block_that_is_used_again() -> None:
    draw = torch.Generator().manual_seed(3)
    sources = [torch.randn(shape, generator=draw) for shape in ((3, 5), (), (0, 4), (1,))]
    sources += [torch.randn(7, generator=draw).double()[1::2], torch.randn(4, 3, generator=draw).t()]
    copies = module.HostCopies(torch.device("cpu"))
    places = []
    for factor in (1.0, 2.0):
        parts = [Part(f"w{n}", "model", tuple(x.shape), (0,) * x.dim(), x * factor) for n, x in enumerate(sources)]
        copied = copies.copies(parts)
        for part in parts:
            part.tensor.fill_(-1.0)
        for source, copy in zip(sources, copied, strict=True):
            assert copy.tensor.dtype == source.dtype
            assert copy.tensor.is_contiguous()
            assert torch.equal(copy.tensor, source * factor)
        places.append([copy.tensor.data_ptr() for copy in copied if copy.tensor.numel()])
    assert places[0] == places[1]
    assert max(places[0]) - min(places[0]) <= 64 * len(sources)
    more = copies.copies([Part("w", "model", (100,), (0,), torch.arange(100.0))])
    assert torch.equal(more[0].tensor, torch.arange(100.0))


def test_a_process_of_an_earlier_attempt_spoils_no_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It still writes when the run has been started again, and saves the same step."""
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_parts", lambda *arguments, **options: go_on.wait() and write(*arguments, **options))
        earlier, later = make_saver(config), make_saver(config)
        earlier.begin(1, state_of(torch.zeros(3)))
    later.store.clear_remains()
    later.begin(1, state_of(torch.ones(3)))
    go_on.set()
    with pytest.raises(UserError, match="could not be saved"):
        earlier.finish()
    assert stored(later.finish()) == [1.0] * 3
    assert names(later) == ["latest", "step_00000001"]
    for each in (earlier, later):
        each.close()
