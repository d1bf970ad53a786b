"""A profiled run: its files, a slow part in its row, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.build import build_trainer
from pretrain.loop.parts import timed_methods
from pretrain.loop.profile import Profile
from pretrain.loop.profiled_steps import ProfiledSteps
from pretrain.loop.trainer import Trainer
from pretrain.report.step_parts import PARTS
from tests.helpers import joined, resolved, write_run

ASLEEP = 0.02  # seconds that attention of each layer takes longer


@contextmanager
def trained(folder: Path, data: Path, asked: str, *overrides: str) -> Iterator[Trainer]:
    """A run of twelve steps on FSDP and one rank, with recomputation, whose first step has been taken."""
    options = ("--backend=fsdp", "--training.recompute_activations=true", "--training.steps=12", "--validation.every_steps=0")
    config = resolved(write_run(folder, data), [*options, *overrides])
    with joined(0, 1, folder) as layout:
        trainer = build_trainer(config, layout, others=[Profile(ProfiledSteps.parse(asked, 12))])
        trainer.advance()
        yield trainer
        trainer.close()


def slow(project: Callable[..., Any]) -> Callable[..., Any]:
    def slept(*given: Any) -> Any:
        time.sleep(ASLEEP)
        return project(*given)

    return slept


def methods(trainer: Trainer) -> list[Any]:
    return [vars(timed.holder).get(timed.method) for timed in timed_methods(trainer)]


def test_a_profile_shows_a_slow_part_and_leaves_nothing(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trained(tmp_path, prepared, "steps=3-4") as trainer:
        blocks: Any = trainer.backend.module.get_submodule("blocks")
        before, wait = methods(trainer), dist.Work.wait
        for block in blocks:
            block.attention.project = slow(block.attention.project)
        for _ in range(3):
            trainer.advance()
        assert methods(trainer) == before
        assert dist.Work.wait is wait
    folder = tmp_path / "run" / "profile" / "steps_3-4"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_00000.parts.json", "rank_00000.pt.trace.json.gz"]
    found = json.loads((folder / "rank_00000.parts.json").read_text())
    assert (found["rank"], found["device"], found["steps"]) == (0, "cpu", [3, 4])
    parts, step = found["parts"], sum(found["step_ms"]) / 2
    assert sum(figures["ms"] for figures in parts.values()) == pytest.approx(step, rel=1e-6)
    assert parts.keys() <= set(PARTS)
    assert {"embedding", "mlp", "norms", "residual", "output", "loss", "optimizer", "loader", "engine", "ours"} <= parts.keys()
    slept = 2 * 4 * ASLEEP * 1000  # in both layers for each of four micro-batches, once more for recomputation
    for phase in ("forward_ms", "recomputed_ms"):
        assert slept < parts["attention"][phase] < 3 * slept, phase
    assert parts["attention"]["backward_ms"] < slept
    shown = capsys.readouterr().out
    assert f"profile of steps 3 to 4, rank 0: {folder}/rank_00000.pt.trace.json.gz\npart " in shown
    assert f"attention     {parts['attention']['ms']:>10,.2f}" in shown
    events = json.loads(gzip.decompress((folder / "rank_00000.pt.trace.json.gz").read_bytes()))["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [name for name in named if name.startswith("ProfilerStep")] == ["ProfilerStep#3", "ProfilerStep#4"]
    assert named.count("part attention") == 2 * 2 * 4 * 2  # steps, layers, micro-batches, passes


def test_a_profile_that_cannot_be_written_is_a_warning(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that the run ends in the middle of has the steps that were taken."""
    with trained(tmp_path, prepared, "steps=3-12") as trainer:
        (tmp_path / "run" / "profile").write_text("in its way")
        trainer.advance()
        trainer.done = True
        trainer.advance()
        assert f"warning: {tmp_path}/run/profile/steps_3-12: the profile cannot be written" in capsys.readouterr().err
        assert methods(trainer).count(None) > 0


def test_steps_that_a_resumed_run_has_behind_it_are_not_profiled(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with trained(tmp_path, prepared, "steps=1") as trainer:
        trainer.run()
    assert "profile step 1 comes after steps 1 to 1: nothing to profile\n" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()
