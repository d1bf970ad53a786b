"""Random generators of a rank, in its file of a checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from model.tensor_file import Entry, write_tensors
from pretrain.checkpoints.files import write_parts
from pretrain.checkpoints.generators import generators, restore_generators

CPU = torch.device("cpu")


def test_a_generator_draws_again_what_it_drew(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.rand(7)
    path, _ = write_parts(tmp_path, 12, [], generators(CPU))
    assert path == tmp_path / "rank_00012.safetensors"
    drawn = torch.rand(3)
    restore_generators(path, CPU)
    assert torch.equal(torch.rand(3), drawn)


def test_a_file_without_generators_leaves_them_as_they_are(tmp_path: Path) -> None:
    path, _ = write_parts(tmp_path, 0, [], {})
    before = torch.get_rng_state()
    restore_generators(path, CPU)
    restore_generators(tmp_path / "rank_00001.safetensors", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_state_of_generators(tmp_path: Path) -> None:
    path = tmp_path / "rank_00000.safetensors"
    for tensors in (
        {"rng/cpu": torch.zeros(3)},
        {"rng/cpu": torch.zeros(3, dtype=torch.uint8)},
        {"rng/other": torch.zeros(3)},
    ):
        write_tensors(path, [Entry.of(name, tensor) for name, tensor in tensors.items()])
        with pytest.raises(UserError, match=r"rank_00000\.safetensors: no state of random generators"):
            restore_generators(path, CPU)
    for content in (b"", b"x" * 100, pickle.dumps({"rng/cpu": [1, 2, 3]})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"rank_00000\.safetensors: no state of random generators"):
            restore_generators(path, CPU)
