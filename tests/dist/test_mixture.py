"""Runs on a mixture: with other weights from a step on, resumed on another number of ranks, they are one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.manifest import TOKENIZER
from tests.helpers import metrics, numbers, run, train, write_run, write_text_files

LATER = "--data.schedule=[{from_step: 4, weights: {more: 1, data: 2}}]"


@pytest.fixture
def config(tmp_path: Path, prepared: Path) -> Path:
    """A run on the small prepared folder and on another one, which has fewer documents and the same tokenizer."""
    texts = write_text_files(tmp_path / "texts")
    for path in sorted(texts.iterdir())[20:]:
        path.unlink()
    prepare(PrepareOptions((str(texts),), tmp_path / "more", tokenizer=prepared / TOKENIZER, split=(70, 30, 0)))
    path = write_run(tmp_path, prepared)
    sources = f"[{{path: {prepared}, weight: 3}}, {{path: {tmp_path / 'more'}, weight: 1}}]"
    path.write_text(path.read_text().replace(f"data: {{path: {prepared}", f"data: {{sources: {sources}"))
    return path


def test_weights_change_and_ranks_change_and_the_run_goes_on(tmp_path: Path, config: Path) -> None:
    whole = train(config, LATER, f"--run.folder={tmp_path / 'whole'}")
    assert train(config, "--checkpoint.every_steps=3") != whole
    arguments = ["launch/pretrain.py", "--config", str(config), "--resume=step:3"]
    refused = run([*arguments, LATER.replace("4", "2")])
    assert refused.returncode == 1
    assert "data: other shares of the sources in the first 3 steps" in refused.stderr
    result = run([*arguments, LATER, "--parallel.zero_stage=2"], processes=2)
    assert result.returncode == 0, result.stderr
    assert "data    2 sources; sequence 16\n        data 0.7" in result.stdout
    parts = metrics(tmp_path / "run")
    names = ("step", "loss", "grad_norm")
    torch.testing.assert_close(torch.tensor(numbers(parts, *names)), torch.tensor(numbers(whole, *names)), rtol=2e-5, atol=1e-6)
    shares = numbers(parts, "step", "data/share/data", "data/share/more")
    assert [step for step, *_ in shares] == [1, 2, 3, 4, 5, 6]
    assert shares == numbers(whole, "step", "data/share/data", "data/share/more")
    assert shares[3][1] == pytest.approx(0.75, abs=1 / 32)
    assert shares[5][1:] == pytest.approx(((24 + 16 * 2 / 3) / 48, (8 + 16 / 3) / 48), abs=1 / 48)
