"""The command's words: what it runs by default, lists and refuses."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.sweep import main, parse_arguments
from pretrain.studies import machine
from pretrain.studies.records import Outcome, write_outcome
from tests.helpers import ROOT


@pytest.fixture
def study(tmp_path: Path, prepared: Path) -> Path:
    """The example study with the tests' data."""
    text = (ROOT / "configs/studies/heads_cpu.yaml").read_text()
    changes = {
        "folder: runs/studies/heads_cpu": f"folder: {tmp_path / 'study'}",
        "base: configs/quickstart_cpu.yaml": f"base: {ROOT / 'configs/quickstart_cpu.yaml'}",
        "set: {model.hidden_size": f"set: {{data.path: {prepared}, model.hidden_size",
    }
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after, 1)
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, words)])
    assert main() is None
    return capsys.readouterr().out.splitlines()


def test_the_example_is_sound_and_listed(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study/tune/mhe_add,0.001"
    folder.mkdir(parents=True)
    write_outcome(folder, Outcome("finished", None, 1.0, "", "", 1))
    head, *rows, total, left = printed(monkeypatch, capsys, "list", study)
    assert head.split() == ["child", "parameters", "steps", "tokens", "FLOPs"]
    assert len(rows) == 22
    assert [row.split()[1] for row in rows][3:6] == ["tune/mhe_add,0.003", "heads/mha,8,0", "heads/mha,8,1"]
    assert [row.split()[0] for row in rows if row.endswith("finished")] == ["3"]
    assert total.startswith("22 children, 5,406,720 tokens, ")
    assert left == "left: 1-2,4-22"
    assert max(map(len, rows)) <= 100


def test_commands_of_a_part_are_those_that_the_sweep_runs(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(monkeypatch, capsys, "list", study, "--part", "tune", "--commands")
    words = [shlex.split(line) for line in lines]
    assert len(words) == 4
    assert all(line[:2] == [sys.executable, str(machine.PRETRAIN)] for line in words)
    assert words[0][-2:] == [f"--run.folder={tmp_path / 'study/tune/mha,0.001'}", "--resume=auto"]


def test_run_is_meant_where_no_command_is_named() -> None:
    assert parse_arguments(["s.yaml", "--jobs", "3"]) == parse_arguments(["run", "s.yaml", "--jobs", "3"])
    assert parse_arguments(["list", "s.yaml"]).command == "list"


@pytest.mark.parametrize(
    "words", [[], ["run"], ["s.yaml", "--srun"], ["s.yaml", "--jobs", "0"], ["list", "s.yaml", "--jobs", "2"]]
)
def test_usage_errors_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(words)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "error"), [(["--part", "x"], "has tune, heads"), (["--child", "23"], "shows the numbers")])
def test_unknown_parts_and_numbers_are_errors(
    study: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], error: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(study), *words])
    with pytest.raises(UserError, match=error):
        main()


def test_too_many_children_at_once_for_the_gpus(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(study), "--jobs", "4"])
    with pytest.raises(UserError, match="4 at once with 1 GPU each, on 3 GPUs: pass --jobs 3"):
        main()
