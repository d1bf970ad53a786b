"""How loss falls with size, data or compute: L = E + A x^-α, with bands and a verdict how far it can be trusted. Torch-free.

The fit is that of Hoffmann et al. 2022 (arXiv 2203.15556), approach 3, in one variable: Huber's loss on differences of
logarithms, from several starts. Bands are a bootstrap over runs: fits of as many runs drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HUBER = 1e-3  # differences of logarithms beyond it count linearly, as in the paper
LEAST_SIZES = 4  # one more than there are parameters
LEAST_DECADES = 0.3
LEAST_FLOOR = 0.01  # as a share of the loss
DRAWS = 200
STEPS, PATIENCE = 150, 6  # a fit ends sooner after so many steps without a gain
GAIN, TINY = 1e-5, 1e-13
ALPHAS = (0.03, 4.0)  # what a fit may reach
FLOORS = (0.0, 0.5, 0.9)  # starts: E as a share of the lowest loss
SLOPES = (0.1, 0.3, 0.8)  # starts: α
LEVELS = (2.5, 97.5)  # percentiles of a band
FIRM_BAND, FIRM_DECADES, FIRM_SIZES, FIRM_SLOPES = 0.02, 1.0, 5, 3.0  # what a law needs that may be read beyond its runs


@dataclass(frozen=True)
class Law:
    """L = floor + scale · x^-slope, and the same parameters in each bootstrap draw, a row each."""

    floor: float
    scale: float
    slope: float
    low: float  # the smallest and the largest x of the runs
    high: float
    sizes: int
    runs: int
    draws: Array

    def at(self, x: float) -> float:
        return self.floor + self.scale * x**-self.slope

    def band(self, x: float) -> tuple[float, float]:
        """Where 95 % of the draws lie."""
        floors, scales, slopes = self.draws.T
        low, high = np.percentile(floors + scales * x**-slopes, LEVELS)
        return float(low), float(high)

    def interval(self, parameter: int) -> tuple[float, float]:
        """Of the floor (0), the scale (1) or the slope (2)."""
        low, high = np.percentile(self.draws[:, parameter], LEVELS)
        return float(low), float(high)

    def width(self, x: float) -> float:
        """The half of a band as a share of the law."""
        low, high = self.band(x)
        return (high - low) / 2 / self.at(x)

    @property
    def decades(self) -> float:
        return float(np.log10(self.high / self.low))

    @property
    def verdict(self) -> str:
        """How far it can be trusted, in a sentence for people."""
        ends = max(self.width(self.low), self.width(self.high))
        low, high = self.interval(2)
        facts = (
            f"{self.sizes} sizes over {self.decades:.2f} decades, {self.runs} runs; α {self.slope:.2f} (95 %: {low:.2f} to "
            f"{high:.2f}); band ±{100 * ends:.2g} % at the ends, ±{100 * self.width(10 * self.high):.2g} % at ten times the "
            "largest"
        )
        weak = [
            *([f"fewer than {FIRM_SIZES} sizes"] if self.sizes < FIRM_SIZES else []),
            *([f"less than {FIRM_DECADES:g} decade"] if self.decades < FIRM_DECADES else []),
            *([f"a band wider than ±{100 * FIRM_BAND:g} %"] if ends > FIRM_BAND else []),
            *(["α is hardly determined"] if high > FIRM_SLOPES * low else []),
            *(["no floor is told from zero"] if self.floor < LEAST_FLOOR * self.at(self.high) else []),
        ]
        if weak:
            return f"{facts}: too weak to extrapolate ({', '.join(weak)}); read it only between the points"
        return f"{facts}: holds between the points; beyond them only as far as the band stays narrow enough for your question"


@dataclass(frozen=True)
class Refused:
    """Why there is no law."""

    reason: str

    @property
    def verdict(self) -> str:
        return f"no law: {self.reason}"


def fit_law(xs: Sequence[float], losses: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Law | Refused:
    """The law of runs with these sizes (parameters, tokens or FLOPs) and losses, one run each; or why there is none."""
    x, loss = np.asarray(xs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if reason := _too_little(x, loss):
        return Refused(reason)
    best = _best(x[None], loss[None])[0]
    if reason := _degenerate(best):
        return Refused(reason)
    chosen = _draws(x, np.random.default_rng(seed), draws)
    fits = _best(x[chosen], loss[chosen], best)
    floor, scale, slope = (float(value) for value in best)
    return Law(floor, scale, slope, float(x.min()), float(x.max()), len(np.unique(x)), len(x), fits)


def _too_little(x: Array, loss: Array) -> str | None:
    sizes = np.unique(x)
    if len(sizes) < LEAST_SIZES:
        return f"{len(sizes)} different sizes; three parameters need at least {LEAST_SIZES}"
    if (decades := float(np.log10(sizes[-1] / sizes[0]))) < LEAST_DECADES:
        return f"the sizes span {decades:.2f} decades (a factor of {sizes[-1] / sizes[0]:.2f}); {LEAST_DECADES} are the least"
    means = np.array([loss[x == size].mean() for size in sizes])
    if np.corrcoef(np.log(sizes), means)[0, 1] >= 0:
        return "the loss does not fall from the smallest to the largest"
    return None


def _degenerate(fit: Array) -> str | None:
    slope = fit[2]
    if slope <= ALPHAS[0] * 1.05:
        return f"the best α is below {ALPHAS[0]:g}: the loss falls like a logarithm, and no power law is told from it"
    if slope >= ALPHAS[1] * 0.95:
        return f"the best α is above {ALPHAS[1]:g}: all of the fall is at the smallest size, and a constant fits the others"
    return None


def _draws(x: Array, generator: np.random.Generator, draws: int) -> NDArray[np.int64]:
    """Numbers of the drawn runs, a row each; a draw of too few sizes is drawn again."""
    rows: list[NDArray[np.int64]] = []
    while len(rows) < draws:
        row = generator.integers(0, len(x), len(x))
        if len(np.unique(x[row])) >= min(LEAST_SIZES, len(np.unique(x))):
            rows.append(row)
    return np.stack(rows)


def _best(x: Array, loss: Array, start: Array | None = None) -> Array:
    """For each row of runs, the best fit of all starts, as (floor, scale, slope); with `start` from there and two others."""
    rows = len(x)
    centre = np.log(x).mean()
    u, y = np.log(x) - centre, np.log(loss)
    lowest = loss.min(axis=1)
    starts = [(share * lowest, np.full(rows, slope)) for share in FLOORS for slope in SLOPES]
    if start is not None:
        starts = [(np.minimum(start[0], 0.98 * lowest), np.full(rows, start[2])), starts[1], starts[-1]]
    found, costs = [], []
    for floors, slopes in starts:
        rest = np.log(np.maximum(loss - floors[:, None], 1e-9)) + slopes[:, None] * u
        theta = np.stack([np.log(np.maximum(floors, 1e-6)), np.median(rest, axis=1), np.log(slopes)], axis=1)
        theta, cost = _descend(u, y, theta)
        found.append(theta)
        costs.append(cost)
    theta = np.stack(found)[np.argmin(np.stack(costs), axis=0), np.arange(rows)]
    slope = np.exp(theta[:, 2])
    return np.stack([np.exp(theta[:, 0]), np.exp(theta[:, 1] + slope * centre), slope], axis=1)


def _descend(u: Array, y: Array, theta: Array) -> tuple[Array, Array]:
    """Levenberg-Marquardt with Huber's weights, all rows at once; theta is (log E, log A, log α). Returns it and its cost."""
    damping = np.full(len(theta), 1e-2)
    bounds = np.array([[-14.0, -30.0, np.log(ALPHAS[0])], [y.max(), 60.0, np.log(ALPHAS[1])]])
    residual, slopes = _residuals(u, y, theta)
    cost, idle = _huber(residual), 0
    for _ in range(STEPS):
        weights = np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-15))
        gradient = np.einsum("rn,rn,rnp->rp", weights, residual, slopes)
        hessian = np.einsum("rn,rnp,rnq->rpq", weights, slopes, slopes)
        diagonal = np.einsum("rpp->rp", hessian)
        hessian = hessian + np.einsum("rp,pq->rpq", damping[:, None] * diagonal + 1e-12, np.eye(3))
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        tried = np.clip(theta - np.clip(step, -2, 2), *bounds)
        tried_residual, tried_slopes = _residuals(u, y, tried)
        tried_cost = _huber(tried_residual)
        better = tried_cost < cost
        idle = 0 if (cost - tried_cost > GAIN * cost + TINY).any() else idle + 1
        if idle == PATIENCE:
            break
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
        theta = np.where(better[:, None], tried, theta)
        residual = np.where(better[:, None], tried_residual, residual)
        slopes = np.where(better[:, None, None], tried_slopes, slopes)
        cost = np.where(better, tried_cost, cost)
    return theta, cost


def _residuals(u: Array, y: Array, theta: Array) -> tuple[Array, Array]:
    """log L − y and its derivatives by theta."""
    floor, scale, slope = theta[:, :1], theta[:, 1:2], np.exp(theta[:, 2:])
    power = scale - slope * u
    total = np.logaddexp(floor, power)
    of_floor, of_power = np.exp(floor - total), np.exp(power - total)
    return total - y, np.stack([of_floor, of_power, -of_power * slope * u], axis=2)


def _huber(residual: Array) -> Array:
    size = np.abs(residual)
    costs: Array = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(axis=1)
    return costs
