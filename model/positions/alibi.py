"""ALiBi: a bias on scores that decreases with the distance to the key. Torch-free."""

from __future__ import annotations

import math


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head (Press et al., arXiv 2108.12409, section 3 and the released code).

    For a power of two, a geometric sequence from 2^(-8/n). Otherwise the slopes of the next lower power of two, followed by
    every second slope of the next higher one.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4 * (i + 1) / below) for i in range(0, 2 * (num_heads - below), 2)]
