"""Plans against arithmetic by hand, and the search against the checks of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest

from configs.load import load_config
from configs.schema import Config
from launch.common import RULES
from model.costs.flops import flops_per_token
from pretrain.planning.cluster import Cluster, make_cluster
from pretrain.planning.plan import SPREAD, plan
from pretrain.planning.search import (
    AXES,
    Candidate,
    best,
    candidates,
    layout_faults,
    losses,
    smallest_change,
    tensor,
    with_fields,
)
from pretrain.planning.table import WIDTH, as_json, compare_table, plan_table, search_table
from tests.helpers import ROOT

H100 = make_cluster("h100")
ONE_B = load_config(str(ROOT / "configs/mhe_add_1b_zero2.yaml"), world_size=16)
ONE_B = ONE_B.resolved(ONE_B.model.vocab_size or 0)
DATA_PARALLEL = tuple(axis for axis in AXES if axis is not tensor)  # each size of tensor parallelism is counted by itself


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    return candidates(ONE_B, 16, H100, RULES, DATA_PARALLEL)


def test_a_plan_by_hand() -> None:
    made = plan(ONE_B, 16, H100)
    steps, batch, length = ONE_B.training.steps, ONE_B.training.global_batch_size, ONE_B.data.sequence_length
    assert made.tokens == steps * batch * length
    assert made.tokens_per_second == pytest.approx(batch * length / made.step.total)
    assert made.mfu(made.tokens_per_second) == pytest.approx(
        made.tokens_per_second * flops_per_token(ONE_B.model, length) / (16 * 989e12)
    )
    saves = math.ceil(steps / ONE_B.checkpoint.every_steps)
    assert made.checkpoints.count == saves
    assert made.checkpoints.bytes == 12 * 1_040_459_776
    assert made.checkpoints.stall == pytest.approx(12 * 1_040_459_776 / 16 / 10e9)
    assert made.seconds == pytest.approx(steps * made.step.total + saves * made.checkpoints.stall)
    assert made.device_hours == pytest.approx(16 * made.seconds / 3600)
    assert made.kilowatt_hours == pytest.approx(made.device_hours * 0.7 * 0.85)
    assert made.attention_share == pytest.approx(made.parameters["attention"] / 1_040_459_776)


def test_a_range_is_wider_on_devices_without_a_published_run() -> None:
    known, unknown = (plan(ONE_B, 16, make_cluster(name)).spread for name in ("h100", "mi300x"))
    assert math.log(known) == pytest.approx(1.65 * SPREAD)
    assert unknown == pytest.approx(known**2)


def test_tables_are_at_most_100_columns_wide(found: list[Candidate]) -> None:
    made = plan(ONE_B, 16, H100)
    listed = best(found, 10)
    texts = [
        plan_table(made, "configs/" + "x" * 120),
        search_table(listed, len(found)),
        compare_table({"a": made, "b:c=1": made}),
    ]
    assert [line for text in texts for line in text.split("\n") if len(line) > WIDTH] == []
    assert f"{made.tokens_per_second:,.0f} tokens/s" in texts[0]
    figures = as_json(made)
    assert figures["step"]["seconds"] == made.step.total
    assert figures["memory"]["total"] == made.memory.total
    assert figures["tokens_per_second"]["low"] < figures["tokens_per_second"]["expected"]


def test_all_candidates_pass_the_checks_of_a_run(found: list[Candidate]) -> None:
    assert len(found) > 50
    for one in found[::7]:
        assert layout_faults(one.plan.config, 16, RULES) == []
        assert with_fields(ONE_B, one.changes) == one.plan.config
    kinds = {(one.plan.config.backend, one.plan.config.parallel.pipeline > 1) for one in found}
    assert kinds == {("deepspeed", False), ("deepspeed", True), ("fsdp", False)}


def test_the_best_layouts_are_the_fastest_that_fit(found: list[Candidate]) -> None:
    """Against all of them, planned one by one."""
    listed = best(found, 4)
    assert all(one.plan.fits for one in listed)
    assert [one.plan.step.total for one in listed] == sorted(one.plan.step.total for one in listed)
    fastest = min((one for one in found if one.plan.fits), key=lambda one: one.plan.step.total)
    assert listed[0].plan.step.total == fastest.plan.step.total
    few = [one for one in found if one.plan.config.training.micro_batch_size == 32 and not one.changes.get("backend")]
    plain = [one for one in few if not one.plan.config.training.recompute_activations]
    assert all("does not fit" in one.reasons[0] for one in best(plain, 10))


def test_the_smallest_change_that_fits(found: list[Candidate]) -> None:
    """32 sequences at a time with nothing recomputed do not fit 80 GB; one field suffices."""
    training = ONE_B.training.model_copy(update={"micro_batch_size": 32})
    large = plan(ONE_B.model_copy(update={"training": training}), 16, H100)
    assert not large.fits
    change = smallest_change(candidates(large.config, 16, H100, RULES, DATA_PARALLEL))
    assert change is not None
    assert len(change.changes) == 1
    assert plan(with_fields(large.config, change.changes), 16, H100).fits
    nothing = smallest_change(found)
    assert nothing is not None
    assert nothing.changes == {}  # what fits needs none


def test_a_further_axis_is_one_more_entry() -> None:
    def steps(config: Config, ranks: int, cluster: Cluster) -> Iterable[dict[str, Any]]:
        yield from ({"training.z_loss": weight} for weight in (0.0, 1e-4))

    def only(config: Config, ranks: int, cluster: Cluster) -> Iterable[dict[str, Any]]:
        yield {"training.micro_batch_size": 1}

    found = candidates(ONE_B, 16, H100, RULES, axes=(only, steps))
    assert sorted(one.plan.config.training.z_loss for one in found) == [0.0, 1e-4]
    assert len(AXES) == 4


def test_losses_are_named_with_the_largest_first() -> None:
    config = with_fields(ONE_B, {"parallel.zero_stage": 1, "parallel.pipeline": 8, "training.recompute_activations": True})
    config = with_fields(config, {"training.micro_batch_size": 8})
    lost = losses(plan(config, 16, H100))
    assert [text.split()[0] for text in lost[:2]] == ["recomputation", "pipeline"]
    assert losses(plan(with_fields(config, {"training.recompute_activations": False}), 16, H100))[0].startswith(
        "pipeline bubble"
    )
