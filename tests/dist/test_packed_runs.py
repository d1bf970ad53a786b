"""Runs on packed documents: the same on one and two ranks, when they resume, and when their checkpoints are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.read.manifest import read_manifest
from pretrain.inference import evaluate_checkpoint
from tests.helpers import metrics, numbers, run, train, write_run

PACKED = ("--data.packing=best_fit", "--model.position=rope", "--checkpoint.every_steps=3", "--validation.samples=null")
LOSS, VALIDATION = ("loss", "grad_norm"), ("validation/loss",)


def test_packed_runs_are_the_same_on_every_layout(tmp_path: Path, prepared: Path) -> None:
    one, two = write_run(tmp_path, prepared, "one"), write_run(tmp_path, prepared, "two")
    expected = train(one, *PACKED)
    result = run(["launch/pretrain.py", "--config", str(two), *PACKED], processes=2)
    assert result.returncode == 0, result.stderr
    assert "packing best_fit; data: " in result.stdout
    assert "% padding, " in result.stdout
    found = [numbers(metrics(tmp_path / "two"), *names) for names in (LOSS, VALIDATION)]
    resumed = [numbers(train(two, *PACKED, "--resume=step:3"), *names) for names in (LOSS, VALIDATION)]
    for place, names in enumerate((LOSS, VALIDATION)):
        wanted = numbers(expected, *names)
        assert len(found[place]) == len(wanted) >= 2
        for figures, other in zip([*wanted, wanted[-1]], [*found[place], resumed[place][-1]], strict=True):
            assert other == pytest.approx(figures, rel=1e-5), names


def test_an_evaluation_counts_each_label_of_the_documents_once(tmp_path: Path, prepared: Path) -> None:
    path, valid = write_run(tmp_path, prepared), read_manifest(prepared).splits["valid"]
    (last,) = numbers(train(path, *PACKED), *VALIDATION)[-1]
    figures = evaluate_checkpoint(tmp_path / "run", None, "valid", None, 4)
    assert figures["loss"] == pytest.approx(last, rel=1e-6)
    assert figures["tokens"] == valid.tokens - valid.documents
