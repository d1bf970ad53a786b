"""Code planted in any file of a checkpoint, which its marker vouches for, is never run by whatever reads checkpoints."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from model.tensor_file import read_tensors
from pretrain.checkpoints.folder import read_config
from pretrain.checkpoints.generators import restore_generators
from pretrain.checkpoints.resume import Resumer
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.tools.copy import copy
from pretrain.checkpoints.tools.diff import diff
from pretrain.checkpoints.tools.listing import listing
from pretrain.checkpoints.tools.merge import merge
from pretrain.checkpoints.tools.show import show_list, show_tensor
from pretrain.checkpoints.tools.verify import verify_all
from pretrain.checkpoints.unsharded import load_state, load_weights
from pretrain.distributed.layout import Layout
from pretrain.inference import load_model
from tests.random_checkpoint import random_checkpoint
from tests.unit.pretrain.checkpoints.layouts import reseal

CASES = (
    ("complete.json", "pickle"),
    ("config.yaml", "pickle"),
    ("config.yaml", "yaml"),
    ("config.yaml", "yaml in a section"),
    ("state.json", "pickle"),
    ("tokenizer.json", "pickle"),
    ("gha.safetensors", "pickle"),
    ("gha.safetensors", "torch"),
    ("engine/index.json", "pickle"),
    ("engine/rank_00000.safetensors", "pickle"),
    ("engine/rank_00000.safetensors", "torch"),
)
NEVER_READ = {"gha.safetensors"}  # by anything but a run with grouped heads, which `read_tensors` does


class Planted:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def as_torch(target: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model/w@0": Planted(target)}, buffer)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "pickle": lambda target: pickle.dumps(Planted(target)),
    "torch": as_torch,
    "yaml": lambda target: f"!!python/object/apply:os.mkdir ['{target}']\n".encode(),
    "yaml in a section": lambda target: f"model: !!python/object/apply:os.mkdir ['{target}']\n".encode(),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sound"), "--model.num_layers=1")


def resume(run: Path, folder: Path, sound: Path) -> None:
    good = sound / "checkpoints/step_00000003"
    resumer = Resumer(CheckpointStore(run), Layout(), read_config(good), "d" * 64, (good / "tokenizer.json").read_text())
    start = resumer.find(str(folder))
    assert start is not None
    restore_generators(folder / "engine/rank_00000.safetensors", torch.device("cpu"))


READERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "ls": lambda run, folder, sound: listing(folder),
    "verify": lambda run, folder, sound: verify_all(folder),
    "diff": lambda run, folder, sound: diff(folder, sound / "checkpoints/step_00000003", None),
    "list": lambda run, folder, sound: show_list(folder),
    "show": lambda run, folder, sound: show_tensor(folder, "model/token_embedding.weight", ":2"),
    "merge": lambda run, folder, sound: merge([folder, folder], [1.0, 1.0], run / "merged"),
    "copy": lambda run, folder, sound: copy(folder, run / "copy", overwrite=False),
    "load_weights": lambda run, folder, sound: load_weights(folder),
    "load_state": lambda run, folder, sound: load_state(folder),
    "load_model": lambda run, folder, sound: load_model(folder),
    "resume": resume,
    "gha": lambda run, folder, sound: read_tensors(folder / "gha.safetensors"),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_would_run(tmp_path: Path, payload: str) -> None:
    content = PAYLOADS[payload](tmp_path / "planted")
    if payload == "pickle":
        pickle.loads(content)
    elif payload == "torch":
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        import yaml  # type: ignore[import-untyped]

        yaml.unsafe_load(content)
    assert (tmp_path / "planted").is_dir()


@pytest.mark.parametrize(("name", "payload"), CASES)
def test_nothing_that_is_planted_runs(tmp_path: Path, sound: Path, name: str, payload: str) -> None:
    run = shutil.copytree(sound, tmp_path / "run")
    folder = run / "checkpoints/step_00000003"
    (folder / name).write_bytes(PAYLOADS[payload](tmp_path / "planted"))
    if name != "complete.json":
        reseal(folder)
    refused = {}
    for reader, read in READERS.items():
        try:
            read(run, folder, sound)
        except UserError as error:
            refused[reader] = str(error)
    assert not (tmp_path / "planted").exists()
    assert refused, "nothing has read the file"
    assert name in NEVER_READ or {"load_model", "resume"} & refused.keys()
    for reader, text in refused.items():
        assert str(tmp_path) in text, reader
        lists = name == "config.yaml" or reader == "resume"  # of all faults, or of all that differs
        assert lists or "\n" not in text, reader
