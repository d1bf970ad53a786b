"""One process opens and closes many layouts: each trains as in processes of its own, to the bit, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from configs.schema import Config
from data_pipeline.read.loader import Batch
from pretrain.distributed.collectives import mean_over_ranks
from tests.helpers import TIMEOUT, free_port, launched_as, run_ranks

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout
    from tests.helpers import Opener

SAMPLES, MICRO, STEPS = 8, 2, 2
FSDP = {"backend": "fsdp"}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ZeRO 1": {"zero_stage": 1},
        "FSDP": FSDP,
        "TP 2": {"tensor": 2},
        "PP 2": {"pipeline": 2},
        "ZeRO 3": {"zero_stage": 3},
        "FSDP, TP 2": {**FSDP, "tensor": 2, "sequence": True},
    },
    4: {
        "FSDP, 2 replicas": {**FSDP, "replicate": 2},
        "TP 2 × DP 2": {"tensor": 2, "sequence": True},
        "PP 2 × TP 2": {"pipeline": 2, "tensor": 2},
        "ZeRO 3, TP 2 × DP 2": {"zero_stage": 3, "tensor": 2},
    },
}


def config_of(settings: dict[str, Any]) -> Config:
    parallel = dict(settings)
    values = {
        "run": {"folder": "nowhere"},
        "data": {"path": "nowhere", "sequence_length": 12},
        "model": {
            "attention": "mhe_add",
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "head_dim": 4,
            "max_position_embeddings": 12,
            "dropout": 0.1,
        },
        "backend": parallel.pop("backend", "deepspeed"),
        "parallel": parallel,
        "training": {"steps": STEPS, "global_batch_size": SAMPLES, "micro_batch_size": MICRO},
        "optimizer": {"lr": 1e-2},
    }
    return Config.model_validate(values).resolved(36)


def train(opened: Opener, settings: dict[str, Any]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    from pretrain.build import dropout_seed, make_backend

    config, figures = config_of(settings), []
    with opened(config.parallel) as layout:
        backend = make_backend(config, layout)
        torch.manual_seed(dropout_seed(config, layout, 0))
        for number in range(STEPS):
            tokens_BS = torch.randint(36, (SAMPLES, 13), generator=torch.Generator().manual_seed(number))
            own_BS = tokens_BS.chunk(layout.size("data"))[layout.coordinate("data")]
            result = backend.train_step([Batch(part[:, :-1], part[:, 1:]) for part in own_BS.split(MICRO)], 1e-2)
            (loss,) = mean_over_ranks([result.loss], layout.device)
            figures.append((loss, result.grad_norm))
        assert_groups_are_the_layouts(backend, layout)
    assert_nothing_is_left()
    return figures


def assert_groups_are_the_layouts(backend: Any, layout: Layout) -> None:
    """Also those that libraries communicate in: they have the layout's timeout and, for its axes, are its own groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    assert {group._get_backend(layout.device).options._timeout for group in groups} == {TIMEOUT}
    if layout.size("pipeline") > 1:
        grid = backend.engine.grid
        assert grid.get_pipe_parallel_group() is layout.group("pipeline")
        assert grid.get_data_parallel_group() is layout.group("data")
        assert grid.get_slice_parallel_group() is layout.group("tensor")


def assert_nothing_is_left() -> None:
    import deepspeed
    from deepspeed.runtime.pipe import p2p
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    assert not dist.is_initialized()
    assert not dist.distributed_c10d._world.pg_map
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.nn.functional.linear is torch._C._nn.linear
    assert deepspeed.comm.comm.cdb is groups.mpu is groups._WORLD_GROUP is p2p._grid is None


def in_turn(rank: int, ranks: int, port: int, folder: Path, names: list[str]) -> None:
    with launched_as(rank, ranks, port) as opened:
        found = [(name, train(opened, LAYOUTS[ranks][name])) for name in names]
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def figures_of(folder: Path, ranks: int, names: list[str]) -> list[tuple[str, list[list[float]]]]:
    run_ranks(in_turn, ranks, ranks, free_port(), folder, names, seconds=200)
    return [(name, figures) for name, figures in json.loads((folder / "found.json").read_text())]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_each_layout_trains_as_in_its_own_processes(ranks: int, tmp_path: Path) -> None:
    names = list(LAYOUTS[ranks])
    expected = {name: figures for own in names for name, figures in figures_of(tmp_path, ranks, [own])}
    again = reversed(names) if ranks == 2 else names[:1]  # on two ranks, each after two different ones
    for name, figures in figures_of(tmp_path, ranks, [*names, *again]):
        assert figures == expected[name], name
    losses = [figures[1][0] for figures in expected.values()]
    assert len({tuple(figures[0]) for figures in expected.values()}) > 1  # layouts do differ in rounding
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.05)  # and in what dropout drops
