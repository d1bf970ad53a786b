"""Weights in Hugging Face's form: safetensors files of limited size, and an index if there are several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.durable import write_text
from model.huggingface.fold import Make
from model.tensor_file import Entry, write_tensors

INDEX = "model.safetensors.index.json"
BYTES = 4  # of a float32


def write_shards(folder: Path, makes: Mapping[str, Make], sizes: Mapping[str, torch.Size], largest: int) -> list[str]:
    """Write all tensors as float32, in files of at most `largest` bytes or one tensor, with one tensor in memory.

    Returns the names of the files. Raises OSError.
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
        write_tensors(folder / file, [_entry(name, makes[name], sizes[name]) for name in names])
    if count > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        total = BYTES * sum(sizes[name].numel() for name in makes)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return files


def read_shards(folder: Path, files: list[str]) -> dict[str, Make]:
    """Functions that read each tensor of the files."""
    makes: dict[str, Make] = {}
    for file in files:
        opened: Any = safe_open(folder / file, framework="pt", device="cpu")
        makes |= {name: lambda opened=opened, name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    return makes


def _entry(name: str, make: Make, size: torch.Size) -> Entry:
    return Entry(name, torch.float32, size, lambda: make().float())
