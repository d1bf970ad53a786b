"""Check that an exported model computes what its checkpoint does: compare logits on the same text, in float64 and float32.

The float64 comparison uses the exported weights before rounding, so it tests the algebra; the float32 one uses the weights in
the files. Memory holds one block of a model at a time, and three tensors of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError

EXACT = 1e-9  # of the largest logit, in float64
FEWEST_DIGITS = 1e-6  # of the largest logit, in float32: this much always counts as rounding
TIMES_OURS = 16  # the other model sums in another order: it may differ by this multiple of our own rounding
Logits = Callable[[torch.dtype], Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of two models' logits, and what counts as rounding."""

    largest: float
    allowed: float


@dataclass(frozen=True)
class Equivalence:
    """The report. If the exported model computes in float32 inside, the float64 comparison allows rounding, too."""

    tokens: int
    largest_logit: float
    float64: Difference
    float32: Difference


def compare(tokens: int, ours: Logits, theirs: Logits, rows: int, wide: bool) -> Equivalence:
    """Compare the logits of the first `rows` ids of the vocabulary; UserError if they differ by more than rounding.

    `tokens` is the length of the text. `wide`: the exported model keeps float64 throughout.
    """
    exact_BSV = ours(torch.float64)[..., :rows]
    largest = float(exact_BSV.abs().max())
    float64 = _largest_difference(theirs(torch.float64), exact_BSV)
    rounded_BSV = ours(torch.float32)[..., :rows]
    rounding = max(TIMES_OURS * _largest_difference(exact_BSV, rounded_BSV), FEWEST_DIGITS * largest)
    del exact_BSV
    report = Equivalence(
        tokens,
        largest,
        Difference(float64, EXACT * largest if wide else rounding),
        Difference(_largest_difference(theirs(torch.float32), rounded_BSV), rounding),
    )
    for kind in ("float64", "float32"):
        difference: Difference = getattr(report, kind)
        if not difference.largest <= difference.allowed:
            raise UserError(
                f"the exported model is not equal: in {kind} its logits differ by up to {difference.largest:.2g}, "
                f"where rounding explains {difference.allowed:.2g} (largest logit {largest:.3g}); nothing was written"
            )
    return report


@torch.inference_mode()
def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Overwrites `one`."""
    return float(one.sub_(other).abs_().max())
