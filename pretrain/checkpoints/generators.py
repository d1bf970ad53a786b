"""The random generators of a rank in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from configs.errors import UserError
from model.tensor_file import Entry, read_tensors, write_tensors

GENERATORS = "rng/"  # their folder in a checkpoint


def generators_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"{GENERATORS}rank_{rank:05d}.safetensors"


def write_generators(path: Path, device: torch.device) -> None:
    """Write the states of torch's generators of this process. Raises OSError."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, [Entry.of(name, state) for name, state in states.items()])


def restore_generators(path: Path, device: torch.device) -> None:
    """Restore the states of torch's generators. UserError for a file without them."""
    states, _ = read_tensors(path)
    try:
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no state of random generators for this device ({error})") from error
