"""Tensors read block by block with numpy: the same values from any layout, and one error for what is no file of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from pretrain.checkpoints.files import holding, make_index, write_parts
from pretrain.checkpoints.index import INDEX, index_text
from pretrain.checkpoints.state import State
from pretrain.checkpoints.tools import tensors
from pretrain.checkpoints.tools.tensors import Tensors, figures, read_header
from tests.unit.pretrain.checkpoints.layouts import KINDS, LAYOUTS, SHAPES, values, write

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_any_layout(tmp_path: Path, layout: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", rows * 6)  # values; a row has up to 8
    reader = Tensors(write(tmp_path / "engine", LAYOUTS[layout](values())))
    for kind in KINDS:
        for name, shape in SHAPES.items():
            blocks = list(reader.blocks(f"{kind}/{name}"))
            if shape:
                assert all(block.size <= max(rows * 6, int(np.prod(shape[1:]))) for _, block in blocks)
                assert [start for start, _ in blocks] == [0, *np.cumsum([len(block) for _, block in blocks])[:-1]]
                found = np.concatenate([block for _, block in blocks])
            else:
                ((_, found),) = blocks
            assert np.array_equal(found, values()[kind][name].numpy())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 3) * 20).abs().to(dtype)
    state = State.unsharded({"model": {"w": tensor}}, {})
    (tmp_path / INDEX).write_text(index_text(make_index([holding(state)])))
    write_parts(tmp_path, 0, state.parts, {})
    found = Tensors(tmp_path).rows("model/w", 1, 4)
    assert np.array_equal(found, tensor[1:4].to(torch.float32 if dtype == torch.bfloat16 else dtype).numpy())


def test_figures() -> None:
    values = np.random.default_rng(3).normal(2, 5, 1000).astype(np.float32)
    found = figures(np.array_split(values, 7))
    wide = values.astype(np.float64)
    assert found.norm == pytest.approx(np.linalg.norm(wide), rel=1e-14)
    assert (found.least, found.greatest, found.count) == (wide.min(), wide.max(), 1000)
    assert found.mean == pytest.approx(wide.mean(), rel=1e-13)
    assert np.isnan(figures([np.array([1.0, np.nan])]).norm)


def test_a_header_is_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(3), "a": torch.ones(2, 5, dtype=torch.uint8), "none": torch.zeros(0, 4)}, path, {"x": "y"})
    found = read_header(path)
    assert {name: (span.dtype, span.shape) for name, span in found.spans.items()} == {
        "a": ("U8", (2, 5)),
        "b": ("F32", (3,)),
        "none": ("F32", (0, 4)),
    }
    start, stop = (found.start + place for place in found.spans["a"].data_offsets)
    assert path.read_bytes()[start:stop] == b"\x01" * 10


def header(text: str, values: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + values


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no file of tensors"),
    "short": (b"abc", "is no file of tensors"),
    "pickle": (b"\x80\x04\x95\x1d\x00\x00\x00\x00" + b"a" * 50, "is no file of tensors"),
    "a header of exabytes": (
        (2**63).to_bytes(8, "little") + b"{}",
        r"a header of 9,223,372,036,854,775,808 bytes in a file of 10",
    ),
    "no JSON": (header("abc"), "is damaged"),
    "a list": (header("[]"), "is damaged"),
    "deep": (header("[" * 5000), "is damaged"),
    "values without tensors": (header("{}", b"abc"), "has 13 bytes, its tensors need 10"),
    "an unknown type": (header(json.dumps({"a": entry("F16", (4,))}), b"a" * 8), "'a' is F16"),
    "a negative shape": (header(json.dumps({"a": entry(shape=(-1, -2))}), b"a" * 8), r"'a' is F32 \[-1, -2\]"),
    "an absurd shape": (header(json.dumps({"a": entry(shape=(10**9, 10**9))}), b"a" * 8), "'a' lies at 0 to 8"),
    "a text for a shape": (header(json.dumps({"a": entry(shape="2")}), b"a" * 8), "is damaged"),
    "no offsets": (header(json.dumps({"a": {"dtype": "F32", "shape": [2]}}), b"a" * 8), "is damaged"),
    "a gap": (header(json.dumps({"a": entry(offsets=(4, 12))}), b"a" * 12), "'a' lies at 4 to 12"),
    "an overlap": (header(json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}), b"a" * 12), "'b' lies at 4 to 12"),
    "beyond the file": (header(json.dumps({"a": entry()}), b"a" * 7), "has .* bytes, its tensors need"),
    "bytes left over": (header(json.dumps({"a": entry()}), b"a" * 9), "has .* bytes, its tensors need"),
    "a name twice": (header('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), b"a" * 8), "'a' is there twice"),
    "no tensor": (header(json.dumps({"a": {"b": "c"}})), "'a' is no tensor"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_file_of_tensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rank_00000\.safetensors: .*{message}") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def changed(engine: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file

    path = engine / "rank_00001.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("model/up@3,0"), r"model/up@3,0 is missing, the index says F32 \[3, 5\]"),
        (lambda held: held.update({"model/up@3,0": torch.zeros(5, 3)}), r"is F32 \[5, 3\], the index says F32 \[3, 5\]"),
        (lambda held: held.update({"model/up@3,0": torch.zeros(3, 5).double()}), r"is F64 \[3, 5\], the index says F32"),
    ],
)
def test_parts_that_the_index_has_otherwise(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    engine = write(tmp_path / "engine", LAYOUTS["rows on 3"](values()))
    changed(engine, change)
    with pytest.raises(UserError, match=rf"rank_00001\.safetensors: .*{message}"):
        Tensors(engine).entry("model/up")


def test_a_shape_beyond_all_memory_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    engine = write(tmp_path / "engine", LAYOUTS["unsharded"](values()))
    index = json.loads((engine / INDEX).read_text())
    index["tensors"]["model/up"] = {"shape": [10**7, 10**9], "dtype": "F32", "parts": [[0, [0, 0], [10**7, 10**9]]]}
    (engine / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model/up@0,0 is F32 \[8, 5\], the index says F32 \[10000000, 1000000000\]"):
        next(Tensors(engine).blocks("model/up"))
