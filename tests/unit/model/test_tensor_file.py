"""Files of tensors as safetensors itself reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import UserError
from model.tensor_file import DTYPES, Entry, read_tensors, write_tensors


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors: dict[str, Tensor] = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(3, 5).t()}
    write_tensors(path, [Entry.of(name, tensor) for name, tensor in tensors.items()], {"why": "a test"})
    found, metadata = read_tensors(path)
    assert metadata == {"format": "pt", "why": "a test"}
    for read in (found, load_file(path)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read[name], tensor)
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("F32").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_are_made_one_after_the_other(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.ones(2)

    write_tensors(tmp_path / "a", [Entry(name, torch.float32, (2,), lambda name=name: make(name)) for name in "ab"])  # type: ignore[misc]
    assert made == ["a", "b"]
    with pytest.raises(ValueError, match=r"w: torch\.float32 \(2,\), not torch\.float32 \(3,\)"):
        write_tensors(tmp_path / "a", [Entry("w", torch.float32, (3,), lambda: torch.ones(2))])
    with pytest.raises(ValueError, match="two tensors are named w"):
        write_tensors(tmp_path / "a", [Entry.of("w", torch.ones(1))] * 2)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    canary, path = tmp_path / "executed", tmp_path / "a.safetensors"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (canary,))

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read as tensors"):
        read_tensors(path)
    assert not canary.exists()
    with pytest.raises(UserError, match=r"missing: cannot be read as tensors"):
        read_tensors(tmp_path / "missing")
