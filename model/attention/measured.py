"""GPUs on which the shared-scores kernels were measured to be faster than torch's fused attention: there `auto` takes them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """From `fewest_heads` on, with heads of `head_dim`, both passes were faster. `source`: where the rows are."""

    device: str  # a word of the device's name, such as H200
    head_dim: int
    fewest_heads: int
    source: str


# None yet. Compiled for sm_90 the kernels spill registers, and by their instruction counts they lose to cuDNN at head_dim 64.
# Nobody has timed them.
MEASURED: tuple[Measurement, ...] = ()


def measured_faster(device: str, heads: int, head_dim: int) -> Measurement | None:
    """The measurement that speaks for shared scores on a device of this name; None if there is none."""
    words = re.split(r"[^A-Za-z0-9]+", device)
    for entry in MEASURED:
        if entry.device in words and entry.head_dim == head_dim and heads >= entry.fewest_heads:
            return entry
    return None
