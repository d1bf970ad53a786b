"""Means with what is known of their spread. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

# Student's t at 97.5 % for 1 to 30 degrees of freedom (e.g. Abramowitz and Stegun, table 26.10).
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, their standard deviation (None of one alone), and how many there are."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def words(self, digits: int = 4) -> str:
        """3.4120 ± 0.0040 (3); ± is the standard deviation over seeds."""
        shown = f"{self.mean:,.{digits}f}".replace("-", "−")
        return f"{shown} (1)" if self.deviation is None else f"{shown} ± {self.deviation:.{digits}f} ({self.count})"

    @property
    def low(self) -> float | None:
        return None if self.deviation is None else self.mean - self.deviation

    @property
    def high(self) -> float | None:
        return None if self.deviation is None else self.mean + self.deviation


@dataclass(frozen=True)
class Difference:
    """A mean difference and the half of its 95 % interval; None of one seed alone. `paired`: of equal seeds."""

    mean: float
    half: float | None
    count: int
    paired: bool

    @property
    def separated(self) -> bool:
        """Whether zero is outside the interval."""
        return self.half is not None and abs(self.mean) > self.half


def difference(values: dict[int, float], others: dict[int, float]) -> Difference:
    """`values` minus `others`, by seed: of pairs if they share two seeds or more, else of independent means (Welch 1947)."""
    shared = sorted(values.keys() & others.keys())
    if len(shared) > 1 or (shared and len(values) == len(others) == 1):
        pairs = [values[seed] - others[seed] for seed in shared]
        half = t_quantile(len(pairs) - 1) * stdev(pairs) / sqrt(len(pairs)) if len(pairs) > 1 else None
        return Difference(fmean(pairs), half, len(pairs), paired=True)
    one, other = list(values.values()), list(others.values())
    mean, count = fmean(one) - fmean(other), min(len(one), len(other))
    if count < 2:
        return Difference(mean, None, count, paired=False)
    errors = [stdev(each) ** 2 / len(each) for each in (one, other)]
    below = sum(error**2 / (len(each) - 1) for error, each in zip(errors, (one, other), strict=True))
    freedom = sum(errors) ** 2 / below if below else count - 1
    return Difference(mean, t_quantile(int(freedom)) * sqrt(sum(errors)), count, paired=False)


def t_quantile(freedom: int) -> float:
    """Of Student's distribution, at 97.5 %."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
