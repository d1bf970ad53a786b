"""Random generators of a rank on disk."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from model.tensor_file import Entry, write_tensors
from pretrain.checkpoints.generators import generators_file, restore_generators, write_generators

CPU = torch.device("cpu")


def test_a_generator_draws_again_what_it_drew(tmp_path: Path) -> None:
    path = tmp_path / generators_file(12)
    assert path == tmp_path / "rng/rank_00012.safetensors"
    torch.manual_seed(5)
    torch.rand(7)
    write_generators(path, CPU)
    drawn = torch.rand(3)
    restore_generators(path, CPU)
    assert torch.equal(torch.rand(3), drawn)


def test_what_is_no_state_of_generators(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for tensors in ({"cpu": torch.zeros(3)}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"other": torch.zeros(3)}):
        write_tensors(path, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        with pytest.raises(UserError, match=r"state\.safetensors: no state of random generators"):
            restore_generators(path, CPU)
    for content in (b"", b"x" * 100, pickle.dumps({"cpu": [1, 2, 3]})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.safetensors: cannot be read as tensors"):
            restore_generators(path, CPU)
