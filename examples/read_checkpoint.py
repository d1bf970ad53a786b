"""Read a checkpoint with numpy and safetensors alone: `python examples/read_checkpoint.py CHECKPOINT [TENSOR]`.

Without TENSOR, the name, shape and norm of each tensor; with it, its values.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


def read_tensor(engine: Path, key: str, entry: dict[str, Any]) -> np.ndarray:
    """Assemble a tensor from its parts; `entry` is that of index.json."""
    tensor = np.empty(entry["shape"], np.float32)
    for rank, offset, size in entry["parts"]:
        with safe_open(engine / f"rank_{rank:05d}.safetensors", "np") as file:
            where = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            tensor[where] = file.get_tensor(f"{key}@{','.join(map(str, offset))}")
    return tensor


if __name__ == "__main__":
    engine = Path(sys.argv[1]) / "engine"
    index = json.loads((engine / "index.json").read_text())["tensors"]
    for key in sys.argv[2:]:
        print(read_tensor(engine, key, index[key]))
    if len(sys.argv) == 2:
        for key, entry in sorted(index.items()):
            norm = np.linalg.norm(read_tensor(engine, key, entry).astype(np.float64))
            print(f"{key:<50} {' × '.join(map(str, entry['shape'])):<16} {norm:.6g}")
