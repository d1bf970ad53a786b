"""The command: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config
from launch.common import RULES
from launch.plan import main
from tests.helpers import ROOT, write_run

ONE_B = str(ROOT / "configs/mhe_add_1b_zero2.yaml")


def planned(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
    main()


def test_a_plan_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out.yaml"
    planned(monkeypatch, ONE_B, "--nodes", 2, "--gpu", "h200", "--training.steps=5000", "--json", file, "--write", out)
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n"))) <= 100
    assert "16 × NVIDIA H200" in shown
    assert "5,000 steps" in shown
    figures = json.loads(file.read_text())
    assert figures["fits"]
    assert figures["tokens"] == 5000 * 512 * 2048
    config = load_config(str(out), checks=RULES, world_size=16)
    assert config == load_config(ONE_B, ["--training.steps=5000"], RULES, 16)
    with pytest.raises(UserError, match=r"out\.yaml: exists"):
        planned(monkeypatch, ONE_B, "--gpus", 16, "--write", out)


def test_what_does_not_fit_is_written_with_the_smallest_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.yaml"
    planned(monkeypatch, ONE_B, "--gpus=16", "--gpu=h100", "--training.micro_batch_size=32", "--write", out)
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "The smallest change that fits: --training." in shown
    config = load_config(str(out), checks=RULES, world_size=16)
    assert config.training.micro_batch_size < 32 or config.training.recompute_activations


def test_variants_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planned(monkeypatch, ONE_B, "--gpus=16", "--compare=mha,gqa,mhe_add,mha:num_heads=32", "--match=parameters")
    rows = {line[:28].strip(): line[30:].split() for line in capsys.readouterr().out.split("\n")}
    assert rows["MLP width"][0] < rows["MLP width"][1] < rows["MLP width"][2]  # what attention saves goes into the MLP
    assert len(set(rows["parameters"])) <= 3  # equal within 0.5 %, of which three digits show little: 1.40, B
    assert float(rows["KV cache a token, KiB"][2]) < float(rows["KV cache a token, KiB"][1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([ONE_B], "give --gpus N or --nodes N"),
        ([ONE_B, "--gpus=16", "--nodes=3"], "must be a multiple of --nodes"),
        ([ONE_B, "--gpus=16", "--match=parameters"], "--match: only with --compare"),
        ([ONE_B, "--gpus=16", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_usage_errors(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        planned(monkeypatch, *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_faults_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = write_run(tmp_path, tmp_path / "nowhere")
    for words, message in (
        ([run, "--gpus=1"], "model.vocab_size is null and there is no data"),
        ([ONE_B, "--gpus=16", "--gpu=h300"], "no device h300; it has a100"),
        ([ONE_B, "--gpus=16", "--gpu=l4"], "devices.l4 lacks title, units"),
        ([ONE_B, "--gpus=16", "--network=string"], "no link string"),
        ([ONE_B, "--gpus=16", "--hardware", tmp_path / "none.yaml"], "none.yaml: cannot be read"),
        ([ONE_B, "--gpus=17"], "training.global_batch_size"),
        ([ONE_B, "--gpus=16", "--compare=mha,nothing"], "nothing"),
    ):
        with pytest.raises(UserError, match=message):
            planned(monkeypatch, *words)
    planned(monkeypatch, run, "--gpus=1", "--vocab-size=300")
