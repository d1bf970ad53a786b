"""What is drawn for a sample: a function of its number alone, whatever rank reads it."""

from __future__ import annotations

import hashlib

import numpy as np


def sample_seed(origin: str, number: int) -> int:
    """63 bits for the sample `number` of `origin`: training with its seed, or held-out text."""
    return int.from_bytes(hashlib.sha256(f"draws of {origin}, sample {number}".encode()).digest()[:8], "little") >> 1


def draws(seed: int) -> np.random.RandomState:
    """The draws of a sample with this seed.

    RandomState, whose numbers no later version of NumPy changes, with Philox, which takes a key at once: the default generator
    needs half a millisecond for it.
    """
    return np.random.RandomState(np.random.Philox(key=seed))
