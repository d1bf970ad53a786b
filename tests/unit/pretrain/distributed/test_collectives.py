"""Reductions over real ranks, against the same sums in one process; a failure of one rank reaches all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.errors import UserError
from pretrain.distributed.collectives import barrier, gather_objects, mean_over_ranks, together
from tests.helpers import join_ranks, run_ranks

RANKS = 3
CPU = torch.device("cpu")


def fault_of(action: Callable[[], None]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def work(rank: int, folder: Path) -> None:
    join_ranks(rank, RANKS, folder)

    def fail_on(ranks: tuple[int, ...]) -> None:
        if rank in ranks:
            raise OSError(f"disk {rank} is full")

    found = {
        "mean": mean_over_ranks([0.1 * rank, 2.0**40 + rank], CPU),
        "objects": gather_objects({"rank": rank}),
        "none failed": fault_of(lambda: together(lambda: fail_on(()))),
        "two failed": fault_of(lambda: together(lambda: fail_on((1, 2)))),
        "main failed": fault_of(lambda: together(lambda: fail_on((0, 1, 2)), main_only=True)),
        "others do not run": fault_of(lambda: together(lambda: fail_on((1, 2)), main_only=True)),
    }
    barrier()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_every_rank_has_the_same_result(tmp_path: Path) -> None:
    run_ranks(work, RANKS, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert found[0] == found[1] == found[2]
    one = found[0]
    assert one["mean"] == [pytest.approx(0.1, rel=1e-15), 2.0**40 + 1]
    assert one["objects"] == [{"rank": rank} for rank in range(RANKS)]
    assert (one["none failed"], one["others do not run"]) == (None, None)
    assert (one["two failed"], one["main failed"]) == ("disk 1 is full", "disk 0 is full")


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert mean_over_ranks([1.5], CPU) == [1.5]
    assert gather_objects("own") == ["own"]
    barrier()
    with pytest.raises(UserError, match="RuntimeError"):
        together(lambda: (_ for _ in ()).throw(RuntimeError()))
