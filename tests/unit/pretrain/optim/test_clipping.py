"""Clipping by the norm of several ranks' gradients, against torch's own on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.sharding import Spec, counted_once
from pretrain.optim.clipping import clip_gradients
from tests.helpers import joined, run_ranks

RANKS, LIMIT = 3, 0.5
CPU = torch.device("cpu")


def with_gradient(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def gradients(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])


def shard(rank: int) -> nn.Parameter:
    return with_gradient(rank + 1.0, 2.0)


def work(rank: int, folder: Path) -> None:
    with joined(rank, RANKS, folder):
        parameters = {"shards": shard(rank), "replica": with_gradient(5.0)}
        counted = [parameters[name] for name in counted_once({"shards": Spec(0, RANKS), "replica": Spec()}, rank)]
        world = dist.group.WORLD
        assert world is not None
        norm = clip_gradients(parameters.values(), counted, [world], LIMIT, CPU)
        (folder / f"{rank}.json").write_text(json.dumps([norm, gradients([*parameters.values()]).tolist()]))


def test_every_parameter_counts_once_over_all_ranks(tmp_path: Path) -> None:
    run_ranks(work, RANKS, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    whole = [*map(shard, range(RANKS)), with_gradient(5.0)]
    norm = nn.utils.clip_grad_norm_(whole, LIMIT)
    for (own_norm, own), of_rank in zip(found, whole, strict=False):
        assert own_norm == found[0][0] == pytest.approx(float(norm), rel=1e-6)
        torch.testing.assert_close(torch.tensor(own), gradients([of_rank, whole[-1]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("limit", [1.0, 4.99, 5.0, 5.0000005, 5.00001])
def test_the_rule_is_torchs_near_the_limit(limit: float) -> None:
    ours, theirs = ([with_gradient(3.0, 4.0), nn.Parameter(torch.zeros(1))] for _ in range(2))
    assert clip_gradients(ours, ours, [], limit, CPU) == 5.0
    nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-7, atol=0)


def test_without_a_limit_or_gradients() -> None:
    free = [with_gradient(3.0, 4.0)]
    assert clip_gradients(free, free, [], 0.0, CPU) == 5.0
    assert gradients(free).tolist() == [3.0, 4.0]
    assert clip_gradients([], [], [], 1.0, CPU) == 0.0


@pytest.mark.parametrize("values", [1, 1023, 2**20 + 7, 2**24])
def test_the_norm_of_many_values_is_that_of_float64(values: int) -> None:
    large = nn.Parameter(torch.zeros(values))
    large.grad = torch.rand(values, generator=torch.Generator().manual_seed(values))
    expected = large.grad.double().norm()
    assert clip_gradients([large], [large], [], 0.0, CPU) == pytest.approx(float(expected), rel=1e-8)
