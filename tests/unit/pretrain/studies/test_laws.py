"""Laws of losses that were made by known laws, and of losses without any."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.studies.laws import Law, Refused, fit_law

SIZES = np.geomspace(1e6, 1e8, 6)


def truth(x: np.ndarray) -> np.ndarray:
    return np.asarray(1.7 + 400 * x**-0.34)


def noisy(deviation: float, seeds: int = 3, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x = np.repeat(SIZES, seeds)
    noise = np.random.default_rng(seed).standard_normal(len(x))
    return x, truth(x) * np.exp(deviation * noise)


def law_of(x: np.ndarray, loss: np.ndarray, draws: int = 60) -> Law:
    law = fit_law(x.tolist(), loss.tolist(), draws=draws)
    assert isinstance(law, Law), law
    return law


def test_a_known_law_is_recovered() -> None:
    law = law_of(SIZES, truth(SIZES))
    assert (law.floor, law.scale, law.slope) == pytest.approx((1.7, 400, 0.34), rel=1e-4)
    assert law.band(1e9) == pytest.approx((float(truth(np.array(1e9))),) * 2, rel=1e-4)
    assert (law.sizes, law.runs, law.decades) == (6, 6, pytest.approx(2))
    assert "holds between the points" in law.verdict


def test_bands_contain_the_truth_and_widen_beyond_the_runs() -> None:
    law = law_of(*noisy(0.005))
    for x in (1e6, 1e7, 1e8, 1e9):
        low, high = law.band(x)
        assert low <= truth(np.array(x)) <= high
    low, high = law.interval(2)
    assert 0.2 < low < 0.34 < high < 0.6
    assert law.width(1e9) > 1.5 * law.width(1e7)


def test_one_run_far_off_hardly_changes_the_law() -> None:
    x, loss = noisy(0.0005)
    loss[7] *= 1.3
    assert law_of(x, loss, draws=2).slope == pytest.approx(0.34, abs=0.02)


def test_noise_gives_no_law_or_one_of_a_wide_band() -> None:
    for seed in range(4):
        loss = 4 * np.exp(0.05 * np.random.default_rng(seed).standard_normal(6))
        law = fit_law(SIZES.tolist(), loss.tolist(), draws=60)
        assert isinstance(law, Refused) or (law.width(1e6) > 0.02 and "too weak to extrapolate" in law.verdict)


def test_a_power_law_without_a_floor_is_not_trusted() -> None:
    law = law_of(SIZES, 400 * SIZES**-0.3, draws=10)
    assert law.slope == pytest.approx(0.3, rel=1e-3)
    assert "no floor is told from zero" in law.verdict


def test_bands_are_the_same_for_the_same_seed() -> None:
    x, loss = noisy(0.01)
    bands = [fit_law(x.tolist(), loss.tolist(), seed, draws=20) for seed in (0, 0, 1)]
    assert all(isinstance(law, Law) for law in bands)
    first, second, other = (law.band(1e8) for law in bands if isinstance(law, Law))
    assert first == second != other


@pytest.mark.parametrize(
    ("sizes", "losses", "reason"),
    [
        ([1e6, 2e6, 4e6], [3.0, 2.9, 2.8], "3 different sizes"),
        ([1e6, 1.1e6, 1.2e6, 1.3e6], [3.0, 2.9, 2.8, 2.75], "0.11 decades"),
        ([1e6, 2e6, 4e6, 8e6], [2.7, 2.8, 2.9, 3.0], "does not fall"),
        ([1e6, 1e7, 1e8, 1e9, 1e10], [3.05, 3.0, 2.95, 2.9, 2.85], "like a logarithm"),
        ([1e6, 1e7, 1e8, 1e9, 1e10], [5.0, 3.0, 3.0, 3.0, 3.0], "all of the fall is at the smallest size"),
    ],
)
def test_what_tells_no_law_is_refused(sizes: list[float], losses: list[float], reason: str) -> None:
    law = fit_law(sizes, losses)
    assert isinstance(law, Refused)
    assert reason in law.verdict
