"""Weights as Hugging Face keeps them: safetensors files of a largest size, and an index where there are several."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.durable import sync, write_text

Make = Callable[[], Tensor]
INDEX = "model.safetensors.index.json"
BYTES = 4  # of a float32


def write_shards(folder: Path, makes: Mapping[str, Make], sizes: Mapping[str, torch.Size], largest: int) -> list[str]:
    """Write all tensors as float32, in files of at most `largest` bytes or one tensor; at most a file's tensors are in memory.

    The names of the files. Raises OSError.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name in makes:
        size = BYTES * sizes[name].numel()
        if groups[-1] and filled + size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    files = ["model.safetensors"] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for file, names in zip(files, groups, strict=True):
        _write(folder / file, {name: makes[name]().float().contiguous() for name in names})
    if count > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = BYTES * sum(sizes[name].numel() for name in makes)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return files


def read_shards(folder: Path, files: list[str]) -> dict[str, Make]:
    """What gives each tensor of the files when it is asked for."""
    makes: dict[str, Make] = {}
    for file in files:
        opened: Any = safe_open(folder / file, framework="pt", device="cpu")
        makes |= {name: lambda opened=opened, name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    return makes


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # it comes readable for its owner only
    sync(path)
