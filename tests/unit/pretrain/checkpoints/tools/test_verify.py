"""All faults of a checkpoint, each in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.prepare import progress
from pretrain.checkpoints.tools.verify import verify_all
from tests.unit.pretrain.checkpoints.layouts import reseal, values, write_checkpoint

FILE = "engine/rank_00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", "zero on 4", values())


def flip(path: Path) -> int:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    return path.write_bytes(content)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index, and let the marker vouch for it."""
    path = folder / "engine/index.json"
    index = json.loads(path.read_text())
    change(index["tensors"])
    path.write_text(json.dumps(index))
    reseal(folder)


def hold(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a rank, and let the marker vouch for them."""
    held = load_file(folder / FILE)
    change(held)
    save_file(held, folder / FILE)
    reseal(folder)


def test_nothing_is_wrong(folder: Path) -> None:
    faults, held = verify_all(folder)
    assert faults == []
    parts = sum(len(load_file(path)) - 1 for path in (folder / "engine").glob("*.safetensors"))  # without generators
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "complete.json")
    assert held == f"8 files, {size / 1000:.1f} kB, 10 tensors in {parts} parts"


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit": (lambda f: flip(f / FILE), [f"{FILE}: its content is not what was written (corrupt)"]),
    "an end": (
        lambda f: os.truncate(f / FILE, 70),
        [f"{FILE}: has 70 bytes, 861 were written (truncated?)"],
    ),
    "an end before it was vouched for": (
        lambda f: [os.truncate(f / FILE, 70), reseal(f)],  # type: ignore[func-returns-value]
        [f"{FILE}: is no file of tensors"],
    ),
    "more than was written": (lambda f: os.truncate(f / FILE, 900), [f"{FILE}: has 900 bytes, 861 were written"]),
    "a file": (lambda f: (f / FILE).unlink(), [f"{FILE}: missing from the checkpoint"]),
    "the index": (lambda f: flip(f / "engine/index.json"), ["index.json: its content is not what was written (corrupt)"]),
    "the state": (lambda f: flip(f / "state.json"), ["state.json: its content is not what was written (corrupt)"]),
    "a stranger": (
        lambda f: (f / "engine/rank_00009.safetensors").write_bytes(b""),
        ["complete.json: does not vouch for engine/rank_00009.safetensors"],
    ),
    "two files": (
        lambda f: [flip(f / name) for name in ("tokenizer.json", "engine/rank_00003.safetensors")],
        ["rank_00003.safetensors: its content is not", "tokenizer.json: its content is not"],
    ),
    "a part": (
        lambda f: hold(f, lambda held: held.pop("model/up@0,0")),
        ["'model/up@0,0' is missing there, F32 [2, 5] in index"],
    ),
    "a part of another type": (
        lambda f: hold(f, lambda held: held.update({"model/up@0,0": torch.zeros(3, 5).double()})),
        ["'model/up@0,0' is F64 [3, 5] there, F32 [2, 5] in index.json"],
    ),
    "a part too many": (
        lambda f: hold(f, lambda held: held.update({"model/more@0": torch.zeros(2)})),
        ["'model/more@0' is F32 [2] there, missing in index.json"],
    ),
    "an index of fewer": (
        lambda f: edit(f, lambda tensors: tensors.pop("model/scale")),
        ["'model/scale@' is F32 [] there, missing"],
    ),
    "an index of another rank": (
        lambda f: edit(f, lambda tensors: tensors["model/scale"]["parts"][0].__setitem__(0, 77)),
        [
            "'model/scale@' is F32 [] there, missing",
            "index.json: 1 part is in rank_00077.safetensors, for which complete.json",
        ],
    ),
    "a gap": (
        lambda f: edit(f, lambda tensors: tensors["model/up"]["parts"].pop()),
        ["index.json: is damaged (the parts of model/up do not fill it exactly once)"],
    ),
    "state and configuration": (
        lambda f: [(f / "state.json").write_text("{}"), (f / "config.yaml").write_text("model: {}"), reseal(f)],  # type: ignore[func-returns-value]
        ["state.json: is damaged (step: Field required)"],
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_faults(folder: Path, damage: Callable[[Path], object], expected: list[str]) -> None:
    damage(folder)
    faults, _ = verify_all(folder)
    assert len(faults) == len(expected), faults
    for fault, text in zip(faults, expected, strict=True):
        assert text in fault
        assert fault.startswith(str(folder))
        assert "\n" not in fault


def test_long_work_says_how_much_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    verify_all(folder)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("verify step_00000003: 0 of 0 MB, 0.0 MB/s, ")
    assert lines[-1].endswith(" 0 s left")
    assert len(lines) == 8
