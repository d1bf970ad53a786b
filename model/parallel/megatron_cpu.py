"""What megatron-core needs to run without a GPU. On a machine with a GPU, `install` does nothing.

megatron-core calls CUDA in three places in otherwise device-independent code:

- `torch.cuda.current_device()` gives the device of its communication buffers (gathers along the last dimension, sequence
  parallelism). Here it returns the CPU. Unpatched it raises, so nothing that works without a GPU can depend on it.
- `torch.cuda.synchronize()` before a distributed checkpoint is written. Here it does nothing; unpatched it raises.
- its random number tracker, which synchronises dropout and recomputation over tensor-parallel ranks, reads and sets the CUDA
  generator. Here it uses the CPU's. Our own blocks do not use the tracker (`pretrain/run.py` seeds each rank); Megatron's
  GPTModel, which `model/megatron/spec.py` serves, does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random


def install() -> None:
    """Make megatron-core's layers run on the CPU if there is no GPU. Idempotent."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = _cpu  # type: ignore[assignment]
    torch.cuda.synchronize = _nothing
    megatron_random.CudaRNGStatesTracker = CPURNGStatesTracker
    megatron_random._get_cuda_rng_state = _get_state
    megatron_random._set_cuda_rng_state = _set_state


def _cpu() -> torch.device:
    return torch.device("cpu")


def _nothing(device: Any = None) -> None:
    pass


def _get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


class CPURNGStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker on the CPU's generator: `fork` runs on a named state and restores the generator afterwards."""

    def add(self, name: str, seed: int) -> None:
        """Start the state `name` from `seed`; like Megatron's, it rejects a name or a seed that is taken."""
        if seed in self.seeds_ or name in self.states_:
            raise RuntimeError(f"random state {name} or seed {seed} already exists")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)
