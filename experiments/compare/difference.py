"""The difference of one outcome between two runs.

It is paired by seed, as it is within a run. A seed gives the same initial weights only to the same network; where the
networks differ, a pair differs as much as strangers do, and the interval is as wide. Runs without two seeds in common
are compared as independent samples.
"""

from dataclasses import dataclass

from scipy import stats

from ..results.estimate import CONFIDENCE, SAME, Estimate


@dataclass(frozen=True)
class Difference:
    """Run − reference, of mean accuracies (0 to 1) or losses, with its 95 % confidence interval: Student's for pairs
    of seeds, or Welch's for independent samples of `seeds` and `reference_seeds`. Without two seeds each, or without
    any spread, there is no interval."""

    paired: bool
    seeds: int
    reference_seeds: int
    mean: float
    low: float | None
    high: float | None

    @classmethod
    def between(cls, run: Estimate, reference: Estimate) -> "Difference | None":
        """Paired by the seeds that both have, if there are two of them. None if one side has no seeds."""
        if run.mean is None or reference.mean is None:
            return None
        pairs = run.minus(reference)
        if pairs.n < 2 or pairs.mean is None or pairs.std is None:
            mean, half = run.mean - reference.mean, _welch(run, reference)
            interval = (None, None) if half is None else (mean - half, mean + half)
            return cls(False, run.n, reference.n, mean, *interval)
        interval = (None, None) if pairs.std < SAME else (pairs.low, pairs.high)
        return cls(True, pairs.n, pairs.n, pairs.mean, *interval)


def _welch(run: Estimate, reference: Estimate) -> float | None:
    """Half the confidence interval of the difference of two means of samples that may differ in size and variance."""
    if run.std is None or reference.std is None or max(run.std, reference.std) < SAME:
        return None
    a, b = run.std**2 / run.n, reference.std**2 / reference.n
    freedom = (a + b) ** 2 / (a**2 / (run.n - 1) + b**2 / (reference.n - 1))
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * (a + b) ** 0.5
