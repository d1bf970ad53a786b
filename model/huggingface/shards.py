"""Weights as Hugging Face keeps them: safetensors files of a largest size, and an index where there are several.

Written tensor by tensor: the library's own writer wants all tensors of a file and holds them twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from configs.durable import sync, write_text
from model.huggingface.fold import Make

INDEX = "model.safetensors.index.json"
BYTES = 4  # of a float32


def write_shards(folder: Path, makes: Mapping[str, Make], sizes: Mapping[str, torch.Size], largest: int) -> list[str]:
    """Write all tensors as float32, in files of at most `largest` bytes or one tensor, with one tensor in memory.

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
        _write(folder / file, {name: makes[name] for name in names}, sizes)
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


def _write(path: Path, makes: Mapping[str, Make], sizes: Mapping[str, torch.Size]) -> None:
    """The length of a header, eight bytes; the header, JSON with each tensor's place behind it; the tensors, row by row."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in makes:
        end = offset + BYTES * sizes[name].numel()
        header[name] = {"dtype": "F32", "shape": list(sizes[name]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, make in makes.items():
            file.write(_rows(name, make(), sizes[name]).data)
    sync(path)


def _rows(name: str, tensor: Tensor, size: torch.Size) -> np.ndarray:
    if tensor.shape != size:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(size)}")
    return tensor.float().contiguous().numpy()
