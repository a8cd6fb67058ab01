"""Gradient descent with estimates on one batch: the largest stable rate and the steps to a loss.

A derivative is the product of the gradient, by backpropagation, with the direction: what forward mode
returns (``estimates.py`` measures with its own), at the cost of one backward pass for any K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from costbp.analysis.statistics import interval
from costbp.config.insight import Insight
from costbp.insight.curvature import spectrum
from costbp.insight.points import Point
from costbp.insight.problems import Bench
from costbp.objective import Key
from costbp.theory.descent import slow_down

NEWEST = 0.1  # share of the newest loss in the smoothed one, which may not rise
CLOSE = 1.1  # factor between the largest stable rate and one that is not
SAFE = 0.25  # of the largest stable rate: what steps to a loss are counted at
BP = 0  # instead of a number of directions: the gradient itself


def estimate(gradient: Tensor, count: int, key: Key) -> Tensor:
    """Mean of (g . z) z over ``count`` Gaussian directions, [d]."""
    if count == BP:
        return gradient
    z = torch.randn(count, len(gradient), generator=key.generator(), dtype=gradient.dtype)
    return z.T @ (z @ gradient) / count


def losses(bench: Bench, count: int, rate: float, seed: int) -> Iterator[float]:
    """The loss before each step of plain descent from the start, without end."""
    theta = bench.home.clone()
    for step in range(2**62):
        bench.objective.theta.copy_(theta)
        loss, gradient = bench.objective.gradient(bench.batch)
        theta.sub_(estimate(gradient, count, Key(seed, step)), alpha=rate)
        bench.objective.theta.copy_(bench.home)
        yield float(loss)


def is_stable(bench: Bench, count: int, rate: float, steps: int, seed: int) -> bool:
    """Whether the smoothed loss stays at or below the first one."""
    run = losses(bench, count, rate, seed)
    smooth = first = next(run)
    for _ in range(steps):
        smooth += NEWEST * (next(run) - smooth)
        if not smooth <= first:
            return False
    return True


def largest_rate(bench: Bench, count: int, steps: int, seed: int, guess: float) -> float:
    """The largest stable rate, to a factor of ``CLOSE``: by fours from a guess, then by bisection."""

    def stable(rate: float) -> bool:
        return is_stable(bench, count, rate, steps, seed)

    low = guess
    while not stable(low):
        low /= 4
    high = 4 * low
    while stable(high):
        low, high = high, 4 * high
    while high / low > CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return math.sqrt(low * high)


def steps_to(
    bench: Bench, count: int, rate: float, targets: Sequence[float], longest: int, seed: int
) -> list[int | None]:
    """Steps until the loss is at most each of ``targets``, which fall; None for those that
    ``longest`` steps don't reach."""
    found: list[int | None] = []
    for step, loss in enumerate(islice(losses(bench, count, rate, seed), longest + 1)):
        while len(found) < len(targets) and loss <= targets[len(found)]:
            found.append(step)
        if len(found) == len(targets):
            break
    return found + [None] * (len(targets) - len(found))


def descent(bench: Bench, insight: Insight, counts: Sequence[int]) -> Iterator[Point]:
    """The spectrum; then for BP and for each K the largest stable rate as a share of 2 / |H|, which
    theory gives for BP, and the steps to the losses of BP over BP's own."""
    found = spectrum(bench, insight.seed)
    unit, rank = 2 / found.largest, interval(found.rows["effective rank"])[0]
    about: dict[str, Any] = {"problem": bench.name, "d": bench.d, "count": BP}
    for series, values in found.rows.items():
        yield Point.of(values, **about, question="curvature", series=series)
    bp_rate = largest_rate(bench, BP, insight.steps, insight.seed, unit)
    yield Point.of([bp_rate / unit], **about, question="rate", series="BP")
    reach = sorted(insight.reach)
    run = list(islice(losses(bench, BP, SAFE * bp_rate, insight.seed), reach[-1] + 1))
    targets = [run[steps] for steps in reach]
    seeds = range(insight.seed, insight.seed + insight.descents)
    for count in (count for count in counts if count <= bench.d):
        by_d, by_rank = slow_down(bench.d, count), slow_down(rank, count)
        rates = [largest_rate(bench, count, insight.steps, s, unit / by_rank) for s in seeds]
        taken = [
            steps_to(bench, count, SAFE * rate, targets, insight.longest, seed)
            for rate, seed in zip(rates, seeds, strict=True)
        ]
        about["count"] = count
        wanted: dict[str, Any] = {"predicted": 1 / by_d, "by_rank": 1 / by_rank}
        shares = [rate / unit for rate in rates]
        yield Point.of(shares, **about, question="rate", series="Gaussian", factors=True, **wanted)
        for steps, reached in zip(reach, zip(*taken, strict=True), strict=True):
            ratios = [(insight.longest if n is None else max(n, 1)) / steps for n in reached]
            yield Point.of(
                ratios,
                **about,
                question="slow_down",
                series=f"{steps} steps of BP",
                factors=True,
                given_up=reached.count(None),
                predicted=by_d,
                by_rank=by_rank,
            )
