"""Reductions over real ranks, against the same sums in one process; a failure of one rank reaches all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from configs.errors import UserError
from model.parallel.sharding import Spec, counted_once
from pretrain.distributed.collectives import barrier, gather_objects, gradient_norm, mean_over_ranks, together
from tests.helpers import join_ranks, run_ranks

RANKS = 3
CPU = torch.device("cpu")


def with_gradient(values: list[float]) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


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

    parameters = {"shards": with_gradient([float(rank + 1), 2.0]), "replica": with_gradient([5.0])}
    specs = {"shards": Spec(0, RANKS), "replica": Spec()}
    counted = [parameters[name] for name in counted_once(specs, rank)]
    world = dist.group.WORLD
    assert world is not None
    found = {
        "mean": mean_over_ranks([0.1 * rank, 2.0**40 + rank], CPU),
        "objects": gather_objects({"rank": rank}),
        "norm": gradient_norm(counted, [world]),
        "counted": len(counted),
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
    assert [rank.pop("counted") for rank in found] == [2, 1, 1]
    assert found[0] == found[1] == found[2]
    one = found[0]
    assert one["mean"] == [pytest.approx(0.1, rel=1e-15), 2.0**40 + 1]
    assert one["objects"] == [{"rank": rank} for rank in range(RANKS)]
    assert one["norm"] == pytest.approx((1 + 4 + 9 + 3 * 4 + 25) ** 0.5, rel=1e-6)
    assert (one["none failed"], one["others do not run"]) == (None, None)
    assert (one["two failed"], one["main failed"]) == ("disk 1 is full", "disk 0 is full")


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert mean_over_ranks([1.5], CPU) == [1.5]
    assert gather_objects("own") == ["own"]
    assert gradient_norm([with_gradient([3.0, 4.0]), nn.Parameter(torch.zeros(1))], []) == 5.0
    assert gradient_norm([], []) == 0.0
    barrier()
    with pytest.raises(UserError, match="RuntimeError"):
        together(lambda: (_ for _ in ()).throw(RuntimeError()))
