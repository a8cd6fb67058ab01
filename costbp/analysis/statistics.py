"""Statistics of few seeds: intervals and p values that hold for five paired differences.

A comparison is a :class:`Sample`: one difference a seed, of runs that saw the same batches, so that
Student's t holds for few of them where a percentile bootstrap would undercover. Differences are on an
additive scale (shares of examples, logarithms of ratios), and positive ones speak for the claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike

ALPHA = 0.01  # at which a claim's comparisons are decided, all of them together
OUTSIDE = 0.05  # of intervals, simultaneous ones too
POWER = 0.9  # of the number of seeds that a claim asks for
FLOOR = 1e-3  # of a standard deviation: five equal differences are a matter of luck, not certainty
ENOUGH = 8  # comparisons from which on an aggregate has a bootstrap interval


@dataclass(frozen=True)
class Sample:
    """One comparison.

    Attributes:
        values: a difference a seed; a single one where ``exact``.
        exact: counted, not drawn: it has no spread.
        at_least, at_most: some values are bounds, since a run never got there.
    """

    values: np.ndarray
    exact: bool = False
    at_least: bool = False
    at_most: bool = False

    @cached_property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @cached_property
    def deviation(self) -> float:
        return 0.0 if self.exact else max(FLOOR, float(np.std(self.values, ddof=1)))

    @cached_property
    def p(self) -> float:
        """Two-sided, of no difference."""
        if self.exact:
            return float(self.mean == 0)
        from scipy.special import stdtr

        count = len(self.values)
        return float(2 * stdtr(count - 1, -abs(self.mean) / self.deviation * math.sqrt(count)))

    def interval(self, alpha: float = OUTSIDE) -> tuple[float, float]:
        """Two-sided interval of level ``1 - alpha``; open where values are bounds."""
        if self.exact:
            half = 0.0
        else:
            count = len(self.values)
            half = quantile(1 - alpha / 2, count - 1) * self.deviation / math.sqrt(count)
        low = -math.inf if self.at_most else self.mean - half
        return low, math.inf if self.at_least else self.mean + half

    def seeds_needed(self, alpha: float = ALPHA) -> float:
        """Seeds at which an effect of this size and spread would be decided, with power ``POWER``."""
        from scipy.special import ndtri

        if self.exact or self.mean == 0:
            return math.inf
        effect = abs(self.mean) / self.deviation
        count = 5.0
        for _ in range(20):  # t's quantile depends on what is looked for
            above = quantile(1 - alpha / 2, max(1.0, count - 1)) + float(ndtri(POWER))
            count = (above / effect) ** 2
        return max(float(len(self.values) + 1), math.ceil(count))


@lru_cache(4096)
def quantile(level: float, freedom: float) -> float:
    """Of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, level))


def interval(values: ArrayLike) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval (Student's t), NaN left out; both ends are the mean where
    values are one or don't differ, all are NaN where there is none."""
    found = np.asarray(values, dtype=float)
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan, math.nan
    mean, half = float(found.mean()), 0.0
    if len(found) > 1:
        error = float(found.std(ddof=1)) / math.sqrt(len(found))
        half = quantile(1 - OUTSIDE / 2, len(found) - 1) * error
    return mean, mean - half, mean + half


def holm(found: Sequence[float]) -> list[float]:
    """p values of several comparisons, adjusted so that all hold together (Holm 1979)."""
    adjusted, largest = [0.0] * len(found), 0.0
    for rank, place in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        largest = max(largest, min(1.0, (len(found) - rank) * found[place]))
        adjusted[place] = largest
    return adjusted


def largest(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """The largest mean of several comparisons with simultaneous bounds of the largest true one: for a
    choice of the largest is made after looking (Bonferroni; 95 % for both sides together)."""
    bounds = [sample.interval(OUTSIDE / len(samples)) for sample in samples]
    return (
        max(sample.mean for sample in samples),
        max(low for low, _ in bounds),
        max(high for _, high in bounds),
    )


def aggregate(means: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean over comparisons, and its bootstrap interval (BCa, Efron 1987) where they are enough."""
    value = float(np.mean(means))
    if len(means) < ENOUGH or np.ptp(means) == 0:
        return value, None, None
    from scipy.stats import bootstrap

    found = bootstrap((np.asarray(means),), np.mean, n_resamples=2000, rng=np.random.default_rng(0))
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)
