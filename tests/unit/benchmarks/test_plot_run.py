"""A picture of a run's metrics, and what is no run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import run

STEP = {"loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 100.0}


@pytest.mark.parametrize("held_out", [True, False])
def test_a_picture_of_a_run_with_and_without_validation(tmp_path: Path, held_out: bool) -> None:
    lines: list[dict[str, float]] = [{"step": step, **STEP} for step in (1, 2)]
    lines += [{"step": 2, "validation/loss": 3.5}] if held_out else []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(["benchmarks/plot_run.py", str(tmp_path), "--output", str(tmp_path / "run.png"), "--unigram", "6"])
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width == 1430


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (b"\x89PNG\n\x00\n", "run.png", "metrics.jsonl: is damaged (line 1 is no JSON object with a step); mend it or move"),
        (b'{"step": 2, "validation/loss": 1}\n', "run.png", "metrics.jsonl: has no training steps; name the folder of a run"),
        (None, "run.png", "metrics.jsonl: has no training steps; name the folder of a run"),
        (b'{"step": 2, "loss": 1}\n', "none/run.png", "none/run.png: no such folder; make it, or name another file"),
        (b'{"step": 2, "loss": 1}\n', "run.jpeg", "run.jpeg: must end in .png or .svg"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, content: bytes | None, output: str, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    result = run(["benchmarks/plot_run.py", str(tmp_path), "--output", str(tmp_path / output)])
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
