"""Figures of runs from files that the test wrote, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.studies.results import read_child, read_run
from tests.unit.pretrain.studies.fabricated import TOKENS, write_child, write_run


def test_sizes_and_figures_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "one", {5: 4.0, 10: 3.0}, seconds=2.0, sets=("code", "prose")))
    sizes, measured = run.sizes, run.measured
    assert sizes is not None
    assert measured is not None
    # Width 8, two heads of 4: attention has four projections of 8 × 8 in each of two layers, with biases if the model has them.
    assert run.config is not None
    biases = 4 * 8 * run.config.model.bias
    assert sizes.attention_parameters == 2 * (4 * 8 * 8 + biases)
    assert (sizes.kv_bytes, sizes.query_freedom) == (2 * 2 * 8 * 2, 8)
    assert (measured.steps, measured.tokens, measured.seconds) == (10, 10 * TOKENS, 20.0)
    assert measured.flops == sizes.flops_per_token * 10 * TOKENS
    assert (measured.tokens_per_second, measured.memory_gib) == (TOKENS / 2, pytest.approx(0.6))
    assert (measured.training_loss, measured.loss, measured.bits_per_byte) == (pytest.approx(4.0), 3.0, 0.75)
    assert measured.sets == {
        "code": {"loss": 3.0, "bits_per_byte": 0.75},
        "prose": {"loss": 4.0, "bits_per_byte": 1.0},
    }
    assert measured.heads == {"output_similarity": [(5 * TOKENS, 0.96), (10 * TOKENS, 0.97)]}


def test_losses_between_validations_are_linear_in_the_logarithm(tmp_path: Path) -> None:
    curve = read_run(write_run(tmp_path / "one", {2: 5.0, 8: 3.0}, seconds=3.0)).curve
    assert curve is not None
    assert curve.at("tokens", 4 * TOKENS) == pytest.approx(4.0)  # 4 is the middle of 2 and 8
    assert curve.at("seconds", 4 * 3.0, bits=True) == pytest.approx(1.0)
    assert curve.at("tokens", 3 * TOKENS) == pytest.approx(5.0 - 2.0 * math.log(1.5) / math.log(4))
    assert (curve.at("tokens", TOKENS), curve.at("tokens", 9 * TOKENS)) == (None, None)
    assert (curve.end("tokens"), curve.end("seconds")) == (8 * TOKENS, 24.0)


def test_a_run_without_validation_has_its_training_loss(tmp_path: Path) -> None:
    curve = read_run(write_run(tmp_path / "one", {})).curve
    assert curve is not None
    assert not curve.held_out
    assert curve.at("tokens", 10 * TOKENS) == pytest.approx(4.0)
    assert curve.at("tokens", 10 * TOKENS, bits=True) is None


def test_children_in_every_state(tmp_path: Path) -> None:
    finished = read_child(write_child(tmp_path, "part", {"run.seed": "0"}, {10: 3.0}), "part")
    assert (finished.status, finished.wall_seconds, finished.usable) == ("finished", 20.0, True)
    running = read_child(write_child(tmp_path, "part", {"run.seed": "1"}, {}, status="running", done=4), "part")
    assert running.measured is not None
    assert (running.status, running.measured.steps, running.usable) == ("running", 4, False)
    failed = read_child(write_child(tmp_path, "part", {"run.seed": "2"}, {}, status="failed"), "part")
    assert (failed.status, failed.error, failed.axes) == ("failed", "out of <memory>", {"run.seed": "2"})
    assert read_child(tmp_path / "part" / "9", "part").status == "missing"


def test_a_damaged_child_is_a_failed_one(tmp_path: Path) -> None:
    folder = write_child(tmp_path, "part", {"run.seed": "0"}, {10: 3.0})
    (folder / "metrics.jsonl").write_text("no JSON\n" + (folder / "metrics.jsonl").read_text())
    run = read_child(folder, "part")
    assert (run.status, run.usable) == ("failed", False)
    assert "is damaged (line 1" in (run.error or "")


def test_a_folder_without_steps_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "none", {}, done=0)
    with pytest.raises(UserError, match="none: has no training steps"):
        read_run(folder)
