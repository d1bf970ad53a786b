"""The random generators of a rank: entries of its file in a checkpoint, beside its parts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError

PREFIX = "rng/"  # of their names; a part's name has an @


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators of this process, by the names that they have in a file."""
    states = {f"{PREFIX}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{PREFIX}cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(path: Path, device: torch.device) -> None:
    """Restore what `generators` gave, if there is a file of the rank and it has some. UserError for states that do not fit."""
    if not path.exists():  # a checkpoint that one process wrote for several
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118  # not a mapping
            states = {name: file.get_tensor(name) for name in names}
        if states:
            torch.set_rng_state(states[f"{PREFIX}cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(states[f"{PREFIX}cuda"], device)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no state of random generators for this device ({error})") from error
