"""What a run ran on, as its folder says it."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from pretrain.distributed.layout import Layout
from pretrain.report import environment as module
from pretrain.report.environment import append_environment, environment
from tests.helpers import ROOT


def test_a_line_for_each_start(tmp_path: Path) -> None:
    for first_step in (0, 20):
        append_environment(tmp_path, environment(Layout(), first_step))
    lines = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert [line["first_step"] for line in lines] == [0, 20]
    assert lines[0]["hosts"] == {platform.node(): 1}
    assert sum(lines[0]["devices"].values()) == 1
    assert lines[0]["packages"]["torch"] == torch.__version__
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    assert lines[0]["code"]["commit"] == (head.strip() or None)


def test_code_that_is_no_clone_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(Layout(), 0)["code"] == {"commit": None}
    monkeypatch.setenv("PATH", "")
    assert environment(Layout(), 0)["code"] == {"commit": None}
