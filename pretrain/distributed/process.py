"""Settings of this process: device, threads, determinism; seeds that differ by purpose and rank."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch

from pretrain.distributed.layout import Layout


def prepare_process(layout: Layout, deterministic: bool) -> None:
    """Set device, threads and determinism; call it before any tensor is made."""
    if layout.device.type == "cuda":
        torch.cuda.set_device(layout.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // layout.local_world_size))
    if deterministic and layout.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # warn_only would leave attention's backward pass nondeterministic
        deterministic_options: Any = torch.utils.deterministic
        deterministic_options.fill_uninitialized_memory = False  # costs time and changes no result of ours


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and number, such as a rank; runs with neighbouring seeds share none."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
