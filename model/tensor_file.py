"""Files of named tensors in the safetensors format, written tensor by tensor and read without executing code.

The library's own writer needs all tensors of a file at once and holds them twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.durable import sync
from configs.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `make` returns it when it is written."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        return cls(name, tensor.dtype, tensor.shape, lambda: tensor)


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Write the file, synced, with one tensor in host memory at a time; its size and SHA-256. Raises OSError.

    Format: the header's length in eight bytes; the header, JSON with each tensor's offsets; the tensors, row-major.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"{path}: two tensors are named {entry.name}")
        end = start + prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": [*entry.shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    digest = hashlib.sha256()  # taken here, so that nobody has to read the file again

    with path.open("wb") as file:

        def write(values: bytes | memoryview) -> None:
            file.write(values)
            digest.update(values)

        write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            write(_values(entry))
    sync(path)
    return 8 + len(text) + start, digest.hexdigest()


def _values(entry: Entry) -> memoryview:
    tensor = entry.make()
    if (tensor.dtype, tensor.shape) != (entry.dtype, torch.Size(entry.shape)):
        raise ValueError(f"{entry.name}: {tensor.dtype} {tuple(tensor.shape)}, not {entry.dtype} {tuple(entry.shape)}")
    values: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return values


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file on the CPU, and its metadata. UserError if it is not such a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as tensors ({error})") from error
