"""Collectives by latency and bandwidth, what hides them, and the pipeline's bubble, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.load import load_config
from configs.schema import Config
from pretrain.planning.cluster import LINK, make_cluster
from pretrain.planning.timing import PARTS, Execution, stage_layers, step_time
from pretrain.planning.traffic import Transfer
from tests.helpers import ROOT

H100 = make_cluster("h100")


def nothing(stage: int) -> list[Transfer]:
    """What ranks send."""
    return []


def shipped(name: str) -> Config:
    processes = {"mhe_mul_7b_tp8_pp4_zero1": 64, "mhe_add_7b_fsdp_hybrid": 32}
    config = load_config(str(ROOT / f"configs/{name}.yaml"), world_size=processes[name])
    return config.resolved(config.model.vocab_size or 0)


def test_collectives_within_and_between_nodes() -> None:
    gib = 2.0**30
    within = H100.seconds("all_gather", gib, 10, group=8, stride=1)
    assert within == pytest.approx(gib / (LINK * 450e9) + 10 * 7 * 3.4e-6)
    alone = H100.seconds("reduce_scatter", gib, 10, group=4, stride=8)  # one member a node, each with an adapter
    assert alone == pytest.approx(gib / (LINK * 50e9) + 10 * 3 * 14e-6)
    both = H100.seconds("all_gather", gib, 1, group=16, stride=1)  # eight adapters a node are nearly as fast as its links
    assert both == pytest.approx(gib / (LINK * 400e9) + 7 * 3.4e-6 + 14e-6)
    many = H100.seconds("all_gather", 0, 1, group=8192, stride=1)  # a tree: twice log2 of 1,024 nodes
    assert many == pytest.approx(7 * 3.4e-6 + 20 * 14e-6)
    assert H100.seconds("all_reduce", 0, 1, 8, 1) == 2 * H100.seconds("all_gather", 0, 1, 8, 1)
    assert H100.seconds("all_gather", gib, 1, group=1, stride=1) == 0
    shared = make_cluster("h100", "ethernet_100")  # one adapter for the eight devices of a node
    assert shared.seconds("all_gather", gib, 1, 2, 8) == pytest.approx(gib / (LINK * 12.5e9 / 8) + 50e-6)


def test_parts_of_a_step_add_up_and_grow_with_micro_batches() -> None:
    config = shipped("mhe_add_7b_fsdp_hybrid")
    step = step_time(config, 32, H100, nothing)
    assert step.total == pytest.approx(sum(getattr(step, part) for part in PARTS))
    assert step.bubble == step.exposed == 0
    training = config.training.model_copy(update={"global_batch_size": 2 * config.training.global_batch_size})
    twice = step_time(config.model_copy(update={"training": training}), 32, H100, nothing)
    assert twice.products == pytest.approx(2 * step.products)
    assert twice.optimizer == step.optimizer


def test_a_bubble_is_what_the_other_stages_take_for_one_micro_batch() -> None:
    config = shipped("mhe_mul_7b_tp8_pp4_zero1")
    step = step_time(config, 64, H100, nothing)
    assert step.bubble == pytest.approx(3 / 128 * (step.total - step.bubble - step.optimizer))
    halved = step_time(config, 64, H100, nothing, Execution(interleave=2))
    assert halved.bubble == pytest.approx(step.bubble / 2)


def test_recomputation_repeats_the_forward_pass_of_the_blocks() -> None:
    config = shipped("mhe_add_7b_fsdp_hybrid")
    training = config.training.model_copy(update={"recompute_activations": True})
    plain, again = (step_time(one, 32, H100, nothing) for one in (config, config.model_copy(update={"training": training})))
    assert again.products == plain.products
    assert 0.25 < again.repeated / (plain.products + plain.attention + plain.passes) < 0.36


def test_what_hides_a_collective() -> None:
    config = shipped("mhe_add_7b_fsdp_hybrid")

    def exposed(transfer: Transfer, execution: Execution | None = None) -> tuple[float, float]:
        (timed,) = step_time(config, 32, H100, lambda stage: [transfer], execution).transfers
        return timed.seconds, timed.exposed

    open_ = Transfer("shard", "all_gather", "weights", calls=10, bytes=10 * 2**30, group=8, hidden_by="")
    seconds, all_of_it = exposed(open_)
    assert all_of_it == seconds > 0
    assert exposed(open_, Execution(hides={"shard": 0.75}))[1] == pytest.approx(seconds / 4)
    small = replace(open_, hidden_by="forward")
    assert exposed(small)[1] == pytest.approx(exposed(small)[0] / 10)  # the first call
    huge = replace(small, calls=1000, bytes=2**46)
    seconds, left = exposed(huge)
    assert 0.8 * seconds < left < seconds


def test_stages_share_the_blocks() -> None:
    stages = stage_layers(shipped("mhe_mul_7b_tp8_pp4_zero1").model, 4)
    assert [len(stage) for stage in stages] == [8, 8, 8, 8]
    assert stages[0][0] == "embedding"
    assert stages[-1][-1] == "output"
