"""The form of a state on disk: what any layout wrote any other reads, and nothing but that."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoints.files import Reader, holding, make_index, write_parts
from pretrain.checkpoints.index import INDEX, read_index
from pretrain.checkpoints.state import NotFiniteError, Part, State
from tests.unit.pretrain.checkpoints.layouts import KINDS, LAYOUTS, SHAPES, values, write


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write(tmp_path / "engine", LAYOUTS["zero on 3, tensor on 2"](values()))


@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("old", LAYOUTS)
def test_any_layout_reads_what_any_layout_wrote(tmp_path: Path, old: str, new: str) -> None:
    reader = Reader(write(tmp_path / "engine", LAYOUTS[old](values())))
    reader.check(dict.fromkeys(KINDS, SHAPES))
    blank = {kind: {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()} for kind in KINDS}
    for state, expected in zip(LAYOUTS[new](blank), LAYOUTS[new](values()), strict=True):
        reader.load(state)
        for part, wanted in zip(state.parts, expected.parts, strict=True):
            assert torch.equal(part.tensor, wanted.tensor), part.key


@pytest.mark.parametrize("seed", range(60))
def test_random_rectangles(engine: Path, seed: int) -> None:
    draw, reader = random.Random(seed), Reader(engine)
    for kind, of_kind in values().items():
        for name, tensor in of_kind.items():
            spans = [sorted(draw.sample(range(length + 1), 2)) for length in SHAPES[name]]
            part = Part(
                name,
                kind,
                SHAPES[name],
                tuple(start for start, _ in spans),
                torch.full([end - start for start, end in spans], torch.nan),
            )
            reader.fill(part)
            assert np.array_equal(part.tensor.numpy(), tensor.numpy()[tuple(slice(*span) for span in spans)])


def test_plain_safetensors_reads_it(tmp_path: Path) -> None:
    """The documented names and places."""
    engine = write(tmp_path / "engine", LAYOUTS["rows on 3"](values()))
    index = json.loads((engine / INDEX).read_text())
    assert index["tensors"]["model/up"] == {
        "shape": [8, 5],
        "dtype": "F32",
        "parts": [[0, [0, 0], [3, 5]], [1, [3, 0], [3, 5]], [2, [6, 0], [2, 5]]],
    }
    files = [load_file(engine / f"rank_{rank:05d}.safetensors") for rank in range(3)]
    joined = torch.cat([files[rank][f"model/up@{first},0"] for rank, first in enumerate((0, 3, 6))])
    assert torch.equal(joined, values()["model"]["up"])
    assert torch.equal(files[0]["exp_avg/scale@"], values()["exp_avg"]["scale"])


def test_only_owners_write(tmp_path: Path) -> None:
    states = [LAYOUTS["unsharded"](values())[0] for _ in range(2)]
    idle = State([Part(p.name, p.kind, p.shape, p.offset, p.tensor, owned=False) for p in states[1].parts], states[1].scalars)
    engine = write(tmp_path / "engine", [states[0], idle])
    assert load_file(engine / "rank_00001.safetensors") == {}
    assert Reader(engine).files("model") == [engine / INDEX, engine / "rank_00000.safetensors"]
    with pytest.raises(UserError, match=r"the ranks' parts do not fit together: the parts of model/embedding do not fill it"):
        make_index([holding(state) for state in states])
    with pytest.raises(UserError, match="the parts of exp_avg/"):
        make_index([holding(state) for state in LAYOUTS["rows on 3"]({"exp_avg": values()["exp_avg"]})[:2]])


def test_ranks_that_disagree() -> None:
    parts = [
        State([Part("w", "model", (2,), (0,), torch.zeros(1, dtype=dtype))], {}) for dtype in (torch.float32, torch.float64)
    ]
    with pytest.raises(UserError, match=r"model/w: F32 \[2\] on one rank, F64 \[2\] on rank 1"):
        make_index([holding(part) for part in parts])


def edit(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((engine / INDEX).read_text())
    change(index)
    (engine / INDEX).write_text(json.dumps(index))


def of_up(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"]["model/up"].update(fields)


def change_part(number: int, place: int, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["tensors"]["model/up"]["parts"][number].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index.update(format="other"), r"is damaged \(format: "),
        (lambda index: index.pop("tensors"), r"is damaged \(tensors: "),
        (lambda index: index["tensors"].update({"../up": index["tensors"]["model/up"]}), r"'\.\./up' is no KIND/NAME"),
        (lambda index: index["tensors"].update({"up": index["tensors"]["model/up"]}), r"'up' is no KIND/NAME"),
        (lambda index: index["tensors"].update({"a/b/c": index["tensors"]["model/up"]}), r"'a/b/c' is no KIND/NAME"),
        (lambda index: index["tensors"].update({"model/a@0": index["tensors"]["model/up"]}), r"'model/a@0' is no KIND/NAME"),
        (of_up(shape=[8, 6]), "the parts of model/up do not fill it exactly once"),
        (of_up(shape=[8, 5, 1]), "a part of model/up has another number of dimensions"),
        (of_up(shape=[-8, 5]), r"is damaged \(tensors.model/up.shape.0: "),
        (of_up(shape="8,5"), r"is damaged \(tensors.model/up.shape: "),
        (of_up(dtype="F16"), r"is damaged \(tensors.model/up.dtype: "),
        (of_up(parts=[]), "the parts of model/up do not fill it exactly once"),
        (of_up(parts=[[0, [0, 0], [10**12, 5]]]), "the parts of model/up do not fill it exactly once"),
        (lambda index: index["tensors"]["model/up"]["parts"].pop(), "the parts of model/up do not fill it exactly once"),
        (change_part(0, 0, "../../x"), r"is damaged \(tensors.model/up.parts.0.0: "),
        (change_part(0, 0, 0.5), r"is damaged \(tensors.model/up.parts.0.0: "),
        (change_part(0, 0, True), r"is damaged \(tensors.model/up.parts.0.0: "),
        (change_part(0, 0, -1), r"is damaged \(tensors.model/up.parts.0.0: "),
        (change_part(0, 0, 10**20), r"is damaged \(tensors.model/up.parts.0.0: "),
        (change_part(0, 1, [1, 0]), "the parts of model/up do not fill it exactly once"),
        (change_part(0, 2, [1, 0]), r"is damaged \(tensors.model/up.parts.0.2.1: "),
    ],
)
def test_a_corrupt_index_is_one_line(engine: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    edit(engine, change)
    with pytest.raises(UserError, match=rf"engine/index\.json: .*{expected}") as caught:
        read_index(engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "manyheads-state-1"}', "\xff"])
def test_what_is_no_index(engine: Path, text: str) -> None:
    (engine / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"engine/index\.json: is damaged"):
        Reader(engine)


def test_a_missing_index_or_file(engine: Path) -> None:
    (engine / "rank_00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank_00002\.safetensors: cannot be read"):
        read_all(engine)
    (engine / INDEX).unlink()
    with pytest.raises(UserError, match=r"engine/index\.json: cannot be read \(No such file"):
        Reader(engine)


def read_all(engine: Path) -> None:
    reader = Reader(engine)
    for kind in KINDS:
        for name in SHAPES:
            reader.read(kind, name)


def first_part(path: Path) -> tuple[dict[str, Tensor], str]:
    tensors = load_file(path)
    return tensors, min(name for name in tensors if name.startswith("model/"))


def test_files_that_are_not_as_the_index_says(engine: Path) -> None:
    path = engine / "rank_00001.safetensors"
    original = path.read_bytes()
    tensors, name = first_part(path)
    changed: list[tuple[Tensor | None, str]] = [
        (None, "cannot be read"),
        (tensors[name].double(), r"is F64 \["),
        (tensors[name].flatten()[:-1].clone(), r"not as index\.json says"),
    ]
    for tensor, expected in changed:
        rest = {other: value for other, value in tensors.items() if other != name}
        save_file(rest if tensor is None else {**rest, name: tensor}, path)
        with pytest.raises(UserError, match=rf"rank_00001\.safetensors: .*{expected}"):
            read_all(engine)
    path.write_bytes(original[:-4])
    with pytest.raises(UserError, match=r"rank_00001\.safetensors: cannot be read"):
        read_all(engine)
    path.write_bytes(original)
    read_all(engine)


def test_what_another_model_asks_for(engine: Path) -> None:
    reader = Reader(engine)
    with pytest.raises(UserError, match=r"index\.json: model/up is F32 \[8, 5\], not F32 \[8, 6\]"):
        reader.fill(Part("up", "model", (8, 6), (0, 0), torch.zeros(8, 6)))
    with pytest.raises(UserError, match=r"model/up is F32 \[8, 5\], not BF16 \[8, 5\]"):
        reader.fill(Part("up", "model", (8, 5), (0, 0), torch.zeros(8, 5, dtype=torch.bfloat16)))
    with pytest.raises(UserError, match=r"does not hold momentum/up"):
        reader.read("momentum", "up")
    for shapes, kinds, expected in (
        ({**SHAPES, "more": (1,)}, KINDS, "it misses exp_avg/more"),
        ({name: shape for name, shape in SHAPES.items() if name != "up"}, ["model"], "it has besides model/up"),
        (SHAPES, [*KINDS, "exp_avg_sq"], "it misses exp_avg_sq/down"),
        ({**SHAPES, "up": (8, 6)}, ["model"], r"model/up is F32 \[8, 5\], in this model F32 \[8, 6\]"),
    ):
        with pytest.raises(UserError, match=expected):
            reader.check(dict.fromkeys(kinds, shapes))


def test_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_parts(tmp_path, 0, LAYOUTS["unsharded"](values())[0].parts, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["model", "exp_avg_sq"])
def test_a_single_value_that_is_not_finite_is_found(tmp_path: Path, bad: float, kind: str) -> None:
    tensors = {name: {"w": torch.full((3, 4), 3e38)} for name in ("model", "exp_avg_sq")}
    parts = State.unsharded(tensors, {}).parts
    write_parts(tmp_path, 0, parts, {}, only_finite=True)
    tensors[kind]["w"][1, 2] = bad
    write_parts(tmp_path, 0, parts, {})
    with pytest.raises(NotFiniteError, match=rf"^{kind}/w is not finite"):
        write_parts(tmp_path, 0, parts, {}, only_finite=True)
