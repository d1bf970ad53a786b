"""What a pruned run does besides training: its first validation, and the page of another run, which may be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.read.sets import UNNAMED
from pretrain.grouping.origin import write_origin
from pretrain.grouping.pruned_run import PrunedRun
from pretrain.loop.hooks import Validation
from tests.helpers import joined, metrics, run_ranks
from tests.unit.pretrain.loop.engine import Held, Loop


def resume(folder: Path, voted: Path, samples: int) -> list[int]:
    """A pruned run that resumes at its last step, which the heads were voted on after; the samples of its validations."""
    held: Any = Held([[1]] * samples)
    loop = Loop(folder, hooks=[Validation({UNNAMED: held}, 0, lambda batch: 0.0), PrunedRun(voted, 6)], first_step=6)
    assert loop.trainer.run() is None
    loop.trainer.close()
    assert loop.trained == 0
    return [int(line["validation/samples"]) for line in metrics(folder / "run") if "validation/loss" in line]


def test_the_first_loss_is_measured_once_for_the_samples_of_the_configuration(tmp_path: Path) -> None:
    found = [resume(tmp_path, tmp_path / "voted", samples) for samples in (2, 2, 3, 3)]
    assert found == [[2], [2], [2, 3], [2, 3]]


@pytest.mark.parametrize("damage", ["page", "metrics"])
def test_another_runs_damage_does_not_end_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    voted = tmp_path / "voted"
    report = voted / "gha/report.html"
    if damage == "page":
        report.mkdir(parents=True)
    else:
        report.parent.mkdir(parents=True)
        names = "".join(f'<section id="{name}" data-step="6"></section>' for name in ("losses", "next"))
        report.write_text(names)
        (voted / "metrics.jsonl").write_text("no metrics\n")
    assert resume(tmp_path, voted, 2) == [2]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2  # at the beginning and at the end
    assert all(line.startswith(f"warning: {report}: cannot be brought up to date (") for line in warnings)


def decide(rank: int, ranks: int, folder: Path) -> None:
    """Rank 1 does not see the note that rank 0 sees."""
    with joined(rank, ranks, folder):
        run = PrunedRun.of(folder / ("pruned" if rank == 0 else "unseen"))
        assert run is not None
        assert (run.voted, run.step) == (folder / "voted", 7)
        assert PrunedRun.of(folder / ("unseen" if rank == 0 else "pruned")) is None


def test_the_first_rank_decides_whether_the_run_was_pruned(tmp_path: Path) -> None:
    for name in ("pruned", "voted", "unseen"):
        (tmp_path / name).mkdir()
    write_origin(tmp_path / "pruned", tmp_path / "voted", 7)
    run_ranks(decide, 2, 2, tmp_path)
