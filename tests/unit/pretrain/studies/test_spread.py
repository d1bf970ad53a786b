"""Spreads and differences against figures by hand and SciPy's tests."""

from __future__ import annotations

import pytest
from scipy import stats

from pretrain.studies.spread import Spread, difference, t_quantile


def test_a_spread_in_words() -> None:
    assert Spread.of([3.0, 5.0]).words(2) == "4.00 ± 1.41 (2)"
    assert Spread.of([-3.0]).words(1) == "−3.0 (1)"
    assert (Spread.of([3.0]).low, Spread.of([1.0, 3.0]).low) == (None, pytest.approx(2 - 2**0.5))


def test_quantiles_are_those_of_students_distribution() -> None:
    for freedom in (*range(1, 31), 50, 200):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)


def test_equal_seeds_are_paired() -> None:
    values, others = {0: 3.0, 1: 3.3, 2: 3.5}, {2: 3.4, 0: 2.8, 1: 3.2}
    found = difference(values, others)
    low, high = stats.ttest_rel([3.0, 3.3, 3.5], [2.8, 3.2, 3.4]).confidence_interval(0.95)
    assert found.paired
    assert (found.mean - (found.half or 0), found.mean + (found.half or 0)) == pytest.approx((low, high), abs=1e-4)
    assert not found.separated
    assert difference({0: 1.0, 1: 1.01}, {0: 0.5, 1: 0.5}).separated


def test_other_seeds_are_compared_as_welch_did() -> None:
    values, others = [3.0, 3.3, 3.5, 3.1], [2.8, 3.2, 2.9]
    found = difference(dict(enumerate(values)), {seed + 9: value for seed, value in enumerate(others)})
    interval = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    assert not found.paired
    assert found.half == pytest.approx((interval.high - interval.low) / 2, rel=0.06)  # ours has whole degrees of freedom


def test_one_seed_separates_nothing() -> None:
    found = difference({0: 9.0}, {0: 1.0})
    assert (found.mean, found.half, found.separated) == (8.0, None, False)
    assert difference({0: 9.0, 1: 8.0}, {5: 1.0}).half is None
