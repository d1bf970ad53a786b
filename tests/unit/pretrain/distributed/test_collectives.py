"""Reductions over real ranks, against the same sums in one process; a failure of one rank reaches all."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.load import ConfigError
from pretrain.distributed.collectives import barrier, gather_objects, mean_over_ranks, together
from tests.helpers import joined, run_ranks

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout

RANKS = 3
CPU = torch.device("cpu")


def fault_of(action: Callable[[], None]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} of {traceback.extract_tb(error.__traceback__)[-1].name}"
    return None


def work(rank: int, folder: Path) -> None:
    with joined(rank, RANKS, folder) as layout:
        found = reduced(layout) | {"faults": faults(layout)}
        barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def reduced(layout: Layout) -> dict[str, Any]:
    rank = layout.rank
    return {
        "mean": mean_over_ranks([0.1 * rank, 2.0**40 + rank], CPU),
        "objects": gather_objects({"rank": rank}),
    }


def faults(layout: Layout) -> dict[str, str | None]:
    """What this rank raises if some do."""
    disk, key = OSError(f"disk {layout.rank} is full"), KeyError("no such figure")
    out_of_memory, nameless = torch.OutOfMemoryError("out of memory\nat all"), ValueError()

    def of(errors: dict[int, Exception], main_only: bool = False) -> str | None:
        def fail() -> None:
            if layout.rank in errors:
                raise errors[layout.rank]

        return fault_of(lambda: together(fail, main_only))

    return {
        "none": of({}),
        "disks": of({1: disk, 2: disk}),
        "main": of({0: disk, 1: disk, 2: disk}, main_only=True),
        "not main": of({1: disk, 2: key}, main_only=True),
        "bug": of({1: key}),
        "main's bug": of({0: out_of_memory}, main_only=True),
        "bugs": of({1: nameless, 2: key}),
        "disk and bug": of({0: disk, 2: key}),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, RANKS, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_every_rank_has_the_same_result(found: list[dict[str, Any]]) -> None:
    for name in ("mean", "objects"):
        assert found[0][name] == found[1][name] == found[2][name]
    one = found[0]
    assert one["mean"] == [pytest.approx(0.1, rel=1e-15), 2.0**40 + 1]
    assert one["objects"] == [{"rank": rank} for rank in range(RANKS)]


def test_all_ranks_raise_when_one_does_and_a_fault_of_the_program_stays_what_it_is(found: list[dict[str, Any]]) -> None:
    by_name = {name: [rank["faults"][name] for rank in found] for name in found[0]["faults"]}
    assert by_name == {
        "none": 3 * [None],
        "disks": 3 * ["disk 1 is full"],
        "main": 3 * ["disk 0 is full"],
        "not main": 3 * [None],
        "bug": [text := "rank 1 failed: KeyError: 'no such figure'", "KeyError of fail", text],
        "main's bug": ["OutOfMemoryError of fail", text := "rank 0 failed: OutOfMemoryError: out of memory", text],
        "bugs": ["rank 1 failed: ValueError", "ValueError of fail", "KeyError of fail"],
        "disk and bug": ["disk 0 is full", "disk 0 is full", "KeyError of fail"],
    }


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert mean_over_ranks([1.5], CPU) == [1.5]
    assert gather_objects("own") == ["own"]
    barrier()
    for raised, expected in ((OSError(), UserError("OSError")), (bug := RuntimeError("a bug"), bug)):
        with pytest.raises(type(expected), match=f"^{expected}$"):
            together(partial(raises, raised))


def test_an_error_keeps_its_kind_and_its_text_whatever_made_it() -> None:
    error = ConfigError("run.yaml", ["is not UTF-8 text"])
    with pytest.raises(ConfigError) as caught:
        together(partial(raises, error))
    assert str(caught.value) == str(error)


def raises(error: Exception) -> None:
    raise error
