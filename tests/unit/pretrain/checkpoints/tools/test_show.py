"""What a checkpoint holds, for people."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pretrain.checkpoints.tools import show
from pretrain.checkpoints.tools.show import show_list, show_tensor
from tests.unit.pretrain.checkpoints.layouts import values, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", "zero on 4", values())


def test_the_list(folder: Path) -> None:
    lines = show_list(folder).splitlines()
    assert lines[0].split() == ["tensor", "shape", "type", "parts"]
    assert [line.split()[0] for line in lines[1:-1]] == sorted(
        f"{kind}/{name}" for kind, of_kind in values().items() for name in of_kind
    )
    assert "model/embedding  11 × 6  F32       4" in [re.sub("  +", "  ", line, count=1) for line in lines]
    assert lines[-1] == f"10 tensors, {sum(tensor.numel() for of in values().values() for tensor in of.values())} values"


def test_a_tensor(folder: Path) -> None:
    text = show_tensor(folder, "exp_avg/embedding", "5:8,-3:")
    tensor = values()["exp_avg"]["embedding"].double().numpy()
    said = dict(line.split(maxsplit=1) for line in text.splitlines()[:8])
    assert (said["kind"], said["name"], said["shape"], said["type"]) == ("exp_avg", "embedding", "11 × 6", "F32")
    figures = [float(said[name]) for name in ("norm", "min", "max", "mean")]
    assert figures == pytest.approx([np.linalg.norm(tensor), tensor.min(), tensor.max(), tensor.mean()], rel=1e-7)
    assert text.splitlines()[8:12] == [
        "parts  [0:6, 0:6] in engine/rank_00000.safetensors",
        "       [6:7, 0:2] in engine/rank_00000.safetensors",
        "       [6:7, 2:6] in engine/rank_00001.safetensors",
        "       [7:11, 0:6] in engine/rank_00001.safetensors",
    ]
    shown = np.array(ast.literal_eval(re.sub(r"(?<=[\d.])\s+(?=[-\d\[])|\n ", ",", text.partition("\n\n")[2])), np.float32)
    assert np.array_equal(shown, tensor[5:8, -3:].astype(np.float32))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("2", (slice(2, 3), slice(0, 6))),
        ("-1,0", (slice(10, 11), slice(0, 1))),
        (":", (slice(0, 11), slice(0, 6))),
        ("9:99, 1", (slice(9, 11), slice(1, 2))),
    ],
)
def test_slices(folder: Path, text: str, where: tuple[slice, slice]) -> None:
    shown = show_tensor(folder, "model/embedding", text).partition("\n\n")[2]
    assert shown == np.array2string(values()["model"]["embedding"].numpy()[where], max_line_width=120)


def test_a_scalar(folder: Path) -> None:
    text = show_tensor(folder, "model/scale", None)
    assert "shape  scalar" in text
    assert f"norm   {abs(values()['model']['scale'].item()):.9g}" in text
    assert "parts  [] in engine/rank_00003.safetensors" in text


@pytest.mark.parametrize(
    ("name", "spans", "message"),
    [
        ("embedding", None, r"has no tensor 'embedding'; did you mean model/embedding\?"),
        ("q_zzz", None, "has no tensor 'q_zzz'$"),
        ("model/up", "1,2,3", "--slice 1,2,3: model/up has 2 dimensions"),
        ("model/scale", "0", "--slice 0: model/scale has 0 dimensions"),
        ("model/up", "a", "--slice a: 'a' is neither a number nor START:STOP"),
        ("model/up", "0:4:2", "'0:4:2' is neither"),
        ("model/up", "", "'' is neither"),
        ("model/up", f"{'9' * 30}", "is neither"),
        ("model/up", "5:2", "--slice 5:2: 0 values of model/up, 8 × 5; at least 1"),
        ("model/up", "8", "--slice 8: 0 values"),
    ],
)
def test_what_is_not_there(folder: Path, name: str, spans: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        show_tensor(folder, name, spans)


def test_long_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "run", "unsharded", {"model": {"w": torch.zeros(101, 100)}})
    with pytest.raises(UserError, match="10,100 values of model/w, 101 × 100; at least 1 and at most 10,000 are shown"):
        show_tensor(folder, "model/w", ":")
    monkeypatch.setattr(show, "MOST_PARTS", 3)
    folder = write_checkpoint(tmp_path / "run", "zero on 4", values())
    assert show_tensor(folder, "model/embedding", None).endswith("\n       and 1 more")
