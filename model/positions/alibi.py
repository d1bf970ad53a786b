"""ALiBi: a bias on scores that falls with the distance to the key. Torch-free."""

from __future__ import annotations

import math


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head (Press et al., arXiv 2108.12409, section 3 and the released code).

    A geometric sequence from 2^(-8/n) for a power of two; otherwise that of the power below, then every second slope of the
    power above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4 * (i + 1) / below) for i in range(0, 2 * (num_heads - below), 2)]
