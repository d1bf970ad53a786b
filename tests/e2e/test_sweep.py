"""A study of a real run, whose sweep is killed and started again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.studies.records import read_outcome
from tests.helpers import numbers, run, start, train, wait_until, write_run


@pytest.mark.timeout(300)  # two starts of a new interpreter
def test_a_killed_sweep_resumes_with_the_losses_of_a_run_that_was_not(tmp_path: Path, prepared: Path) -> None:
    base = write_run(tmp_path, prepared)
    fields = {"training.steps": 150, "validation.every_steps": 0}
    tree = {"name": "s", "folder": str(tmp_path / "study"), "base": str(base), "set": fields}
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({**tree, "parts": {"p": {"grid": {"run.seed": [7]}}}}))
    child = tmp_path / "study/p/7"

    def steps() -> int:
        path = child / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    sweep = start(["launch/sweep.py", str(study)])
    wait_until(lambda: steps() > 3, seconds=100)
    sweep.kill()
    sweep.communicate()
    assert read_outcome(child) is None

    result = run(["launch/sweep.py", "run", str(study)], "python", timeout=150)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 1 done, 0 failed, 0 left" in result.stdout.splitlines()[-1]
    overrides = [f"--{name}={value}" for name, value in {**fields, "run.seed": 7}.items()]
    alone = train(base, *overrides, f"--run.folder={tmp_path / 'alone'}")
    lines = [json.loads(line) for line in (child / "metrics.jsonl").read_text().splitlines()]
    assert numbers(lines, "step", "loss") == numbers(alone, "step", "loss")
    log = (child / "output.log").read_text()
    assert log.count("\nresume ") == 1
    assert log.count("attempt ") == 2
    assert not (child / "checkpoints").exists()
