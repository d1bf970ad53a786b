"""What differs between two checkpoints, whatever layouts wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoints.tools.diff import diff
from tests.unit.pretrain.checkpoints.layouts import KINDS, SHAPES, reseal, values, write_checkpoint


def rows(lines: list[str]) -> dict[str, list[float]]:
    """The three figures of each tensor in the tables."""
    found = [line.split() for line in lines if line.startswith(tuple(f"{kind}/" for kind in KINDS))]
    return {words[0]: [float(text) for text in words[-3:]] for words in found}


def test_the_same_state_of_two_layouts(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    second = write_checkpoint(tmp_path / "b", "zero on 4", values())
    assert diff(first, first, 5) == []
    assert diff(first, second, 5) == [
        f"config.yaml  run.folder: '{tmp_path / 'a'}', '{tmp_path / 'b'}'",
        "state.json  world_size: 1, 4",
    ]


@pytest.mark.parametrize("layout", ["unsharded", "tensor on 2", "zero on 4"])
def test_norms_are_those_of_numpy(tmp_path: Path, layout: str) -> None:
    draw = torch.Generator().manual_seed(8)
    other = {kind: {name: x + torch.randn(x.shape, generator=draw) for name, x in of.items()} for kind, of in values().items()}
    other["exp_avg"]["norm"] = values()["exp_avg"]["norm"]
    first, second = write_checkpoint(tmp_path / "a", "zero on 4", values()), write_checkpoint(tmp_path / "b", layout, other)
    lines = diff(first, second, None)
    found = rows(lines)
    assert len(found) == len(KINDS) * len(SHAPES) - 1
    for kind, of_kind in values().items():
        for name, tensor in of_kind.items():
            a, b = tensor.double().numpy(), other[kind][name].double().numpy()
            if not np.array_equal(a, b):
                expected = [np.linalg.norm(b - a), np.linalg.norm(b - a) / np.linalg.norm(a), np.abs(b - a).max()]
                assert found[f"{kind}/{name}"] == pytest.approx(expected, rel=1e-5)
    for kind in KINDS:
        relative = [figures[1] for key, figures in found.items() if key.startswith(f"{kind}/")]
        assert relative == sorted(relative, reverse=True)
    assert "exp_avg: 4 of 5 tensors differ" in lines
    few = diff(first, second, 2)
    assert len(rows(few)) == 4
    assert "and 3 more; --top shows more" in few


def test_all_that_is_no_common_tensor(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    new = values()
    new["average"] = {"up": new.pop("exp_avg")["up"]}
    second = write_checkpoint(tmp_path / "b", "unsharded", new, "--optimizer.lr=0.5", f"--run.folder={tmp_path / 'a'}", step=7)
    (second / "tokenizer.json").write_text("other")
    reseal(second)
    assert diff(first, second, None) == [
        "config.yaml  optimizer.lr: 0.01, 0.5",
        "state.json  step: 3, 7",
        "state.json  scalars.step: 3.0, 7.0",
        "tokenizer.json  differs",
        "average/up  only in the second",
        *(f"exp_avg/{name}  only in the first" for name in sorted(SHAPES)),
    ]


def test_of_a_whole_kind_as_few_as_asked_for(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    new = values()
    del new["exp_avg"]
    lines = diff(first, write_checkpoint(tmp_path / "b", "unsharded", new, f"--run.folder={tmp_path / 'a'}"), 2)
    names = sorted(SHAPES)[:2]
    assert lines == [*(f"exp_avg/{name}  only in the first" for name in names), "and 3 more; --top shows more"]


def test_another_shape(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    new = values()
    new["model"]["up"] = torch.zeros(2, 2)
    second = write_checkpoint(tmp_path / "b", "unsharded", new)
    assert "model/up  8 × 5, 2 × 2" in diff(first, second, None)


def test_what_is_no_number_comes_first(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "a", "unsharded", values())
    new = values()
    new["model"]["norm"] *= 2
    path = write_checkpoint(tmp_path / "b", "unsharded", new) / "engine/rank_00000.safetensors"
    content = path.read_bytes()
    where = content.index(values()["model"]["down"].numpy().tobytes())
    path.write_bytes(content[:where] + np.float32(np.nan).tobytes() + content[where + 4 :])
    assert list(rows(diff(first, path.parent.parent, None))) == ["model/down", "model/norm"]
