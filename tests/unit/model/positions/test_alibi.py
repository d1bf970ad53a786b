"""ALiBi's slopes against the paper's."""

from __future__ import annotations

import pytest

from model.positions.alibi import alibi_slopes
from tests import reference


@pytest.mark.parametrize("num_heads", sorted(reference.ALIBI_SLOPES))
def test_alibi_slopes(num_heads: int) -> None:
    assert alibi_slopes(num_heads) == reference.ALIBI_SLOPES[num_heads]


def test_alibi_slopes_of_twelve_heads_follow_the_released_code() -> None:
    assert alibi_slopes(12)[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
