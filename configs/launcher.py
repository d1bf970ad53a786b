"""The environment variables that `deepspeed`, `torchrun` or a batch script sets for each process. Torch-free."""

from __future__ import annotations

import os

from configs.errors import UserError, shortened

_RANGES = {
    "WORLD_SIZE": (1, 2**24),
    "RANK": (0, 2**24),
    "LOCAL_RANK": (0, 2**16),
    "LOCAL_WORLD_SIZE": (1, 2**16),
    "MASTER_PORT": (1, 2**16 - 1),
}


def check_launcher() -> None:
    """UserError for the first variable that is set to something impossible."""
    for name, (smallest, largest) in _RANGES.items():
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdigit() and smallest <= int(text[:20]) <= largest):
            wanted = f"a whole number from {smallest} to {largest}"
            raise UserError(
                f"{name}={shortened(text, 60)}: the environment must have {wanted}, as launchers set it, or nothing"
            )
    if rank() >= world_size():
        raise UserError(f"RANK={rank()}: the environment must have a rank below WORLD_SIZE ({world_size()})")


def restarts() -> int:
    """How often torchrun or Slurm has started this command again by itself."""
    counts = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return sum(int(count) for count in counts if count.isascii() and count.isdigit())


def world_size() -> int:
    """Processes of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", "0"))
