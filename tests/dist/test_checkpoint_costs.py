"""What a checkpoint costs R ranks, counted, against the formulas of docs/checkpoints.md, which hold for a thousand as well."""

from __future__ import annotations

import json
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.load import load_config
from pretrain.backends.fsdp import FSDPBackend
from pretrain.checkpoints import files, generators
from pretrain.checkpoints import saver as saver_module
from pretrain.checkpoints.files import Reader, holding, make_index
from pretrain.checkpoints.index import index_text, rank_file
from pretrain.checkpoints.resume import Resumer
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import Block, Part, State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from tests.helpers import free_port, launched_as, run_ranks, write_run
from tests.random_checkpoint import random_checkpoint

SHAPES = {"embedding": (37, 6), "up": (24, 6), "down": (6, 24), "norm": (6,)}
KINDS = ("model", "exp_avg", "exp_avg_sq")


def zero_1(ranks: int, rank: int, shapes: Mapping[str, tuple[int, ...]], device: str = "cpu") -> State:
    """The state of a rank whose share is a range of all parameters laid end to end."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    share, begin = -(-total // ranks), 0
    parts: list[Part] = []
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        start, stop = max(rank * share - begin, 0), min((rank + 1) * share - begin, size)
        if start < stop:
            for kind in KINDS:
                flat = torch.ones(stop - start, device=device)
                parts += Block(name, shape, (0,) * len(shape), shape).fragment(kind, flat, start)
        begin += size
    return State(parts, {"step": [torch.tensor(1.0)]})


class Counts:
    """Files of a checkpoint that this process opens, by name, and the size of what the first rank gathers."""

    def __init__(self, checkpoints: Path) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.gathered = 0
        self.checkpoints = str(checkpoints)
        self.counting = False
        sys.addaudithook(self._opened)

    def _opened(self, event: str, arguments: Any) -> None:
        if self.counting and event == "open" and str(arguments[0]).startswith(self.checkpoints):
            mode = arguments[1] or ""
            (self.written if set(mode) & set("wa+") else self.read)[Path(str(arguments[0])).name] += 1

    @contextmanager
    def during(self) -> Iterator[None]:
        self.counting = True
        yield
        self.counting = False


def count(rank: int, ranks: int, port: int, path: Path) -> None:
    config = load_config(path, ["--training.micro_batch_size=1"], world_size=ranks).resolved(300)
    store = CheckpointStore(Path(config.run.folder))
    counts = Counts(store.folder)
    opened = files.safe_open

    def open_tensors(name: Path, **options: Any) -> Any:  # safetensors opens files past Python
        counts.read[name.name] += counts.counting
        return opened(name, **options)

    for module in (files, generators):
        setattr(module, "safe_open", open_tensors)  # noqa: B010  # a class in their place
    gather = saver_module.gather_to_main

    def gather_counted(value: Any) -> list[Any]:
        found = gather(value)
        counts.gathered += sum(len(pickle.dumps(of_rank)) for of_rank in found)
        return found

    setattr(saver_module, "gather_to_main", gather_counted)  # noqa: B010
    with launched_as(rank, ranks, port) as opened_layout, opened_layout(config.parallel) as layout:
        saver, state = Saver(store, layout, config, "d" * 64, "{}"), zero_1(ranks, rank, SHAPES)
        gathered = []
        for step in (1, 2, 3):
            counts.gathered = 0
            with counts.during():
                saver.begin(step, state)
                saver.finish()
            gathered.append(counts.gathered)
        saver.close()
        written = dict(counts.written)
        counts.read.clear()
        resumer = Resumer(store, layout, config, "d" * 64, "{}")
        with counts.during():
            start = resumer.find("auto")
            assert start is not None
            resumer.restore(start, lambda read: read(state))
    found = {"written": written, "read": dict(counts.read), "gathered": gathered}
    (path.parent / f"counts_{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_files_that_each_rank_opens_and_bytes_that_the_first_gathers(tmp_path: Path, ranks: int) -> None:
    run_ranks(count, ranks, ranks, free_port(), write_run(tmp_path, tmp_path / "data"), seconds=100)
    found = [json.loads((tmp_path / f"counts_{rank}.json").read_text()) for rank in range(ranks)]
    common = dict.fromkeys(("config.yaml", "tokenizer.json", "index.json", "state.json"), 1)
    for rank, of_rank in enumerate(found):
        own = rank_file(rank)
        written = {name.removeprefix(".").removesuffix(".tmp"): number for name, number in of_rank["written"].items()}
        assert written.pop(own) == 3  # one file in each save
        if rank > 0:
            assert written == {}
            assert of_rank["read"] == {own: 3}  # for the hash, the state, the generators
        else:
            assert written == {**dict.fromkeys(common, 3), "complete.json": 3, "latest": 3}
            assert of_rank["read"].pop(own) == 3
            assert set(of_rank["read"]) == {*common, "complete.json"}
            assert max(of_rank["read"].values()) <= 3
    assert sum(1 for path in (tmp_path / "run/checkpoints/step_00000003").rglob("*") if path.is_file()) == ranks + 5
    first, second, third = found[0]["gathered"]
    parts = sum(len(holding(zero_1(ranks, rank, SHAPES))) for rank in range(ranks))
    assert all(200 * ranks < of_save < 700 * ranks for of_save in (second, third))  # hashes of R files
    assert 30 * parts < first - second < 150 * parts  # once: where the parts lie


def test_the_index_of_1024_ranks() -> None:
    """ZeRO 1 of 200 tensors: each rank's share is at most a few rectangles of each tensor that it touches."""
    ranks, shapes = 1024, {f"layers.{number}.weight": (64, 64) for number in range(200)}
    holdings = [holding(zero_1(ranks, rank, shapes, "meta")) for rank in range(ranks)]
    index = make_index(holdings)
    parts = sum(len(entry.parts) for entry in index.tensors.values())
    assert parts <= len(KINDS) * 3 * (ranks + len(shapes))
    assert len(index_text(index)) < 40 * parts + 80 * len(index.tensors)


def read_as_one_of(rank: int, ranks: int, run: Path) -> None:
    """In a process: play ranks of a fake group, which completes collectives without other processes."""
    taken = 0
    opened = files.safe_open

    class Counted:
        def __init__(self, slices: Any) -> None:
            self.get_dtype, self.get_shape, self._slices = slices.get_dtype, slices.get_shape, slices

        def __getitem__(self, where: Any) -> torch.Tensor:
            nonlocal taken
            found: torch.Tensor = self._slices[where]
            taken += found.numel()
            return found

    def open_counted(*arguments: Any, **options: Any) -> Any:
        file = opened(*arguments, **options)
        return SimpleNamespace(get_slice=lambda name: Counted(file.get_slice(name)))

    setattr(files, "safe_open", open_counted)  # noqa: B010  # a class in its place
    folder = CheckpointStore(run).newest()
    assert folder is not None
    whole = Reader(folder / "engine")
    sizes = {"replicate": 4, "tensor": 2}
    overrides = ["--backend=fsdp", "--training.micro_batch_size=1", f"--training.global_batch_size={ranks}"]
    overrides += [f"--parallel.{axis}={size}" for axis, size in sizes.items()]
    config = load_config(folder / "config.yaml", overrides, world_size=ranks)
    shares = []
    for played in (0, ranks - 1):
        layout = Layout(played, ranks, sizes=sizes)
        with layout.opened(FakeStore(), backend="fake"):
            engine = FSDPBackend(config, layout)
            taken = 0
            engine.load_state(whole.load)
            shares.append(taken)
            state = engine.state()
            assert taken == sum(part.tensor.numel() for part in state.parts)  # not a value more than it keeps
            for part in state.parts:
                box = tuple(slice(at, at + size) for at, size in zip(part.offset, part.tensor.shape, strict=True))
                assert torch.equal(part.tensor, whole.read(part.kind, part.name)[box])
    rows_alike = layout.size("shard") * layout.size("tensor")  # some have a row more than others
    total = sum(torch.Size(entry.shape).numel() for entry in whole.index.tensors.values())
    assert 0 < shares[0] < 2 * total / rows_alike, (shares, total / rows_alike)


def test_one_of_1024_ranks_reads_what_it_keeps(tmp_path: Path) -> None:
    run = random_checkpoint(tmp_path, "--model.hidden_size=128", "--model.num_layers=1")
    run_ranks(read_as_one_of, 1, 1024, run)
