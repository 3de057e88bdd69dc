"""Statistics over seeds of one number: of an outcome, or of differences that are paired by seed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from . import words

CONFIDENCE = 0.95
SAME = 1e-6  # accuracies are float32: differences whose spread is below this are equal but for rounding


@dataclass(frozen=True)
class Estimate:
    """Statistics of one number per seed. `std` divides by n - 1; `low` to `high` is the 95 % confidence interval of the
    mean (Student's t). What too few seeds cannot give is None.

    `rank_p`, of differences, is the p-value of Wilcoxon's two-sided signed-rank test: it asks only how often and how
    far up in the order of sizes one side wins, so that a single collapsed member cannot decide it. With less than six
    seeds it is never below 0.05.
    """

    values: dict[int, float]
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    median: float | None = None
    rank_p: float | None = None

    @classmethod
    def of(cls, values: dict[int, float], differences: bool = False) -> "Estimate":
        n, sample = len(values), np.array(list(values.values()), dtype=np.float64)
        if n < 2:
            return cls(values, n, next(iter(values.values()), None), None, None, None)
        mean, std, median = float(sample.mean()), float(sample.std(ddof=1)), float(np.median(sample))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / n**0.5
        rank_p = _signed_rank(sample) if differences else None
        return cls(values, n, mean, std, mean - half, mean + half, median, rank_p)

    @classmethod
    def of_finite(cls, seeds: Iterable[int], values: Iterable[float], differences: bool = False) -> "Estimate":
        """Of a value for each of the seeds, without those that are NaN or infinite."""
        pairs = ((int(seed), float(value)) for seed, value in zip(seeds, values, strict=True))
        return cls.of({seed: value for seed, value in pairs if math.isfinite(value)}, differences)

    def minus(self, other: "Estimate") -> "Estimate":
        """The differences paired by seed, of the seeds that both have."""
        shared = {seed: value - other.values[seed] for seed, value in self.values.items() if seed in other.values}
        return Estimate.of(shared, differences=True)

    @property
    def sign(self) -> int:
        """Of differences: 1 or -1 where the interval is above or below 0, else 0, as where all differ by the same."""
        if self.std is None or self.low is None or self.high is None or self.std < SAME:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def spread(self, scale: float = 1, digits: int = 2) -> str:
        """Mean ± std in words."""
        return words.spread(self.mean, self.std, scale, digits)

    def spread_and_median(self, scale: float = 1, digits: int = 2) -> str:
        """Mean ± std (median) in words."""
        median = "" if self.median is None else f" ({words.number(self.median, scale, digits)})"
        return self.spread(scale, digits) + median

    def difference(self, scale: float = 1, digits: int = 2) -> str:
        """Of differences: the mean and its confidence interval in words."""
        return words.difference(self.mean, self.low, self.high, scale, digits)


def _signed_rank(differences: np.ndarray) -> float:
    """The p-value of the signed-rank test, exact with ties and zeros too (zeros are left out, Wilcoxon's way).

    What is equal but for rounding has the same rank. SciPy's test tries all signs where there are ties, which takes a
    second for twelve seeds; here the sums of ranks are counted.
    """
    rounded = np.round(differences / SAME)
    rounded = rounded[rounded != 0]
    doubled = np.round(2 * stats.rankdata(np.abs(rounded))).astype(int)  # whole numbers, also those of ties
    ways = np.ones(1)  # how often every sum of positive ranks occurs among all choices of signs
    for rank in doubled:
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    positive = doubled[rounded > 0].sum()
    least = min(positive, doubled.sum() - positive)
    return float(min(1.0, 2 * ways[: least + 1].sum() / ways.sum()))
