"""Reports of a fabricated study: the terminal, CSV, JSON, and a page that needs nothing else."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from pretrain.studies.report import report
from tests.unit.pretrain.report.pages import Page
from tests.unit.pretrain.studies.fabricated import write_child

IDS = [f"{variant},{heads},{seed}" for variant in ("mha", "mqa") for heads in (1, 2) for seed in (0, 1)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants with one and two heads and two seeds, of which one failed and one has not begun; and a part of rates."""
    folder = tmp_path_factory.mktemp("study")
    for number, name in enumerate(IDS[:-1]):
        variant, heads, seed = name.split(",")
        axes = {"model.attention": variant, "model.num_heads": heads, "run.seed": seed}
        fields: dict[str, Any] = {"attention": variant, "num_heads": int(heads), "seed": int(seed), "sets": ("a<b", "c")}
        status = "failed" if name == "mqa,2,0" else "finished"
        write_child(folder, "heads", axes, {5: 4.0, 10: 3.0 + 0.1 * number}, status, **fields)
    for rate in (1e-3, 1e-2):
        axes = {"optimizer.lr": f"{rate:g}"}
        write_child(folder, "rates", axes, {5: 4.0, 10: 3.0 - rate}, lr=rate)
    return folder


def write(study: Path, output: Path) -> list[str]:
    axes = ("model.attention", "model.num_heads", "run.seed")
    heads = {name: dict(zip(axes, name.split(","), strict=True)) for name in IDS}
    rates = {rate: {"optimizer.lr": rate} for rate in ("0.001", "0.01")}
    return list(report("fabricated", study, {"heads": heads, "rates": rates}, output))


def test_the_terminal(study: Path, tmp_path: Path) -> None:
    lines = write(study, tmp_path)
    assert max(map(len, lines[:-1])) <= 100
    text = "\n".join(lines)
    assert "heads  8 runs: 6 finished, 1 failed, 1 missing" in text
    assert re.search(r"mha, 1 head +2 .* 3\.0500 ± 0\.0707 +–\n", text)
    # Seeds 0.4 apart, both: the interval of two pairs without any difference has no width.
    assert re.search(r"mqa, 1 head +2 .* 3\.4500 ± 0\.0707 \+0\.4000 ± 0\.0000\n", text)
    assert re.search(r"\nrates: lr 0\.01 +1 .* 2\.9900 +–\nheads: mha, 1 head +2 .* 3\.0500 ± 0\.0707 +\+0\.0600\n", text)
    assert "failed mqa,2,0: out of <memory>" in text
    assert "best learning rate at the edge of those tried: lr 0.01" in text


def test_csv_and_json(study: Path, tmp_path: Path) -> None:
    write(study, tmp_path)
    runs = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [run["child"] for run in runs if run["part"] == "heads"] == IDS
    assert (runs[1]["loss"], runs[1]["c/loss"], runs[-1]["lr"]) == ("3.1", "4.1", "0.01")
    groups = list(csv.DictReader((tmp_path / "groups.csv").read_text().splitlines()))
    assert (groups[0]["group"], float(groups[0]["loss.mean"]), groups[0]["seeds"]) == (
        "mha, 1 head",
        pytest.approx(3.05),
        "0; 1",
    )
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    of_heads = {group["group"]: group for group in parts[0]["groups"]}
    assert of_heads["mqa, 1 head"]["loss_minus_mha"]["mean"] == pytest.approx(0.4)
    assert of_heads["mha, 1 head"]["sets"]["c"]["bits_per_byte"]["mean"] == pytest.approx(4.05 / 4)
    assert [run["status"] for run in parts[0]["runs"]] == ["finished"] * 6 + ["failed", "missing"]


def test_the_page_stands_alone_and_shows_every_run(study: Path, tmp_path: Path) -> None:
    write(study, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|https?:|url\(|@import|src=|<link", text)
    page = Page(text)
    assert "8 of 10 runs in 2 parts are finished; 2 are missing in what follows" in page.within("p#.soft")
    assert page.within("section#part-0.", "div#.error") == ["out of <memory>"]
    assert {"a<b", "c"} <= set(page.within("section#part-0.", "th#."))
    captions = page.within("section#part-0.", "figcaption#.")
    assert "Output similarity along tokens" in captions
    assert captions[:2] == ["Loss against heads", "Loss against query freedom of a layer"]
    assert "Learning rates" in page.within("section#part-1.", "figcaption#.")
    assert "Across 2 parts, 320 tokens of the same text" in page.within("h2#.")
    assert "mha, 1 head: 3.0500 ± 0.0707 (2) at 1" in page.within("svg#.", "title#.")


def test_the_command(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # commands change its first entry
    command = importlib.import_module("launch.sweep")
    axes = {"model.attention": ["mha", "mqa"], "model.num_heads": [1, 2], "run.seed": [0, 1]}
    tree = {"name": "s", "folder": str(study), "base": "none.yaml", "parts": {"heads": {"grid": axes}}}
    (tmp_path / "study.yaml").write_text(json.dumps(tree))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "report", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out")])
    command.main()
    assert "heads  8 runs: 6 finished, 1 failed, 1 missing" in capsys.readouterr().out
    assert "<title>Study s</title>" in (tmp_path / "out" / "report.html").read_text()


def test_a_study_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of the study has begun"):
        list(report("none", tmp_path, {"one": {"0": {}}}, None))
