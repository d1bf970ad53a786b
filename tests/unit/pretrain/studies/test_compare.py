"""A few runs side by side."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from pretrain.studies.compare import differences, read_runs, terminal
from tests.unit.pretrain.report.pages import Page
from tests.unit.pretrain.studies.fabricated import TOKENS, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """mha at half the speed of mqa, which stopped after eight of ten steps."""
    runs = tmp_path_factory.mktemp("runs")
    first = write_run(runs / "slow", {2: 5.0, 8: 4.0, 10: 3.0}, seconds=2.0)
    return [first, write_run(runs / "fast", {2: 5.5, 8: 3.5}, done=8, attention="mqa", lr=2e-3)]


def test_what_differs(folders: list[Path]) -> None:
    assert differences(read_runs(folders).runs) == {"model.attention": ["mha", "mqa"], "optimizer.lr": ["0.001", "0.002"]}


def test_losses_at_equal_tokens_and_time(folders: list[Path]) -> None:
    lines = list(terminal(read_runs(folders), folders))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert f"{folders[1]} (8 of 10 steps)" in text
    cells = [re.split(r" +", line)[-3:] for line in lines if re.match(r"[AB]  +\d", line)]
    # Equal tokens: after eight steps; equal time: 8 s, when mha has done four: the middle of two and eight.
    assert cells == [["3.0000", "4.0000", "4.5000"], ["3.5000", "3.5000", "3.5000"]]
    assert f"@tokens: at {8 * TOKENS}, @time: after 8 s" in text


def test_the_command(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # commands change its first entry
    command = importlib.import_module("launch.compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, folders), "--output", str(tmp_path / "page.html")])
    command.main()
    assert "model.attention: A mha  B mqa" in capsys.readouterr().out
    written = Page((tmp_path / "page.html").read_text())
    assert written.within("div#.legend", "b#.") == ["A  slow", "B  fast"]
    assert "Validation loss along seconds of steps" in written.within("figcaption#.")
    assert "model.attention" in written.within("td#.")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(folders[0])])
    with pytest.raises(SystemExit):
        command.main()
    assert "1 runs: name two to 10" in capsys.readouterr().err
