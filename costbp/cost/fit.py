"""What fits into a memory: the largest batch, length and model of each method."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from costbp.config.catalog import ModelEntry
from costbp.config.methods import BackpropSpec, MethodEntry
from costbp.config.study import Plan
from costbp.cost.bench import Bench, Trace
from costbp.cost.record import Fit, Needs

STEP = 8  # tokens: the grain in which lengths are searched
Shape = tuple[int, int]  # examples a batch, tokens an example
LARGEST = 2**16  # a batch beyond this is no longer a question of memory


def largest(
    bytes_at: Callable[[int], float], limit: float, most: int, guesses: Sequence[int] = (1, 2)
) -> int:
    """The largest n in 1..most with ``bytes_at(n) <= limit``; 0 if there is none.

    ``bytes_at`` must not fall with n. After two guesses each is where the parabola through the last
    three points (at first the line through two) meets the limit: bytes are affine in the batch and,
    where attention is written out, quadratic in the length, so about six calls decide.
    """
    fits, failed = 0, most + 1
    points: dict[int, float] = {}
    while failed - fits > 1:
        asked = len(points)
        guess = guesses[asked] if asked < 2 else _crossing(list(points.items())[-3:], limit)
        guess = min(max(guess, fits + 1), failed - 1)
        points[guess] = bytes_at(guess)
        if points[guess] <= limit:
            fits = guess
        else:
            failed = guess
    return fits


def _crossing(points: Sequence[tuple[int, float]], limit: float) -> int:
    """Where the polynomial through the points (Newton's form) meets the limit, rounded down."""
    (n, at_n), (m, at_m), *rest = reversed(points)
    slope, bend = (at_m - at_n) / (m - n), 0.0
    if rest:
        ((k, at_k),) = rest
        bend = ((at_k - at_m) / (k - m) - slope) / (k - n)
    # at_n + slope (x - n) + bend (x - n)(x - m) = limit, as a quadratic in y = x - n
    linear = slope + bend * (n - m)
    root = linear**2 + 4 * bend * (limit - at_n)
    if root < 0 or linear + math.sqrt(root) <= 0:
        return 2 * max(n, m)
    return n + math.floor(2 * (limit - at_n) / (linear + math.sqrt(root)) + 1e-9)


Curve = Callable[[int], tuple[float, bool]]


def between(one: Trace, n: int, other: Trace, m: int) -> Curve | None:
    """Bytes at the peak as a function of what was ``n`` and ``m`` in two traces, and whether they are
    exact; None where storages don't come and go in the same order.

    Each storage's size is affine, or quadratic without further terms, as scores of attention are in
    the length; their sum's largest value over time is the peak. What a loop needs is as large as
    its turns are cut: where it is part of the peak, that is near enough for a guess.
    """
    ours, theirs = ([t.unrolled() for t in trace.timelines] for trace in (one, other))
    pairs, same = list(zip(ours, theirs, strict=False)), len(ours) == len(theirs)
    if not (same and all(np.array_equal(a.died, b.died) for a, b in pairs)):
        return None

    def at(x: int) -> tuple[float, bool]:
        peaks, without = [], []
        for a, b in pairs:
            quadratic = (a.sizes > 0) & np.isclose(b.sizes * n**2, a.sizes * m**2, 1e-12, 0)
            straight = a.sizes + (b.sizes - a.sizes) * (x - n) / (m - n)
            sizes = np.where(quadratic, a.sizes * (x / n) ** 2, straight)
            peaks.append(replace(a, sizes=sizes).peak)
            without.append(replace(a, sizes=np.where(a.loops > 0, 0, sizes)).peak)
        return one.resident + max(peaks), max(peaks) == max(without)

    return at


@dataclass
class Fitting:
    """Searches on one bench; a step is traced once per method, batch and length."""

    bench: Bench
    methods: Mapping[str, MethodEntry]
    _known: dict[tuple[str, Shape], Trace] = field(default_factory=dict)
    _curves: dict[tuple[str, Shape, bool], Curve | None] = field(default_factory=dict)

    def trace(self, name: str, shape: Shape, replay: bool = False) -> Trace:
        if (name, shape) not in self._known:
            self._known[name, shape] = self.bench.trace(self.methods[name], *shape, replay=replay)
        return self._known[name, shape]

    def fit(self, name: str, memory: str, limit: float, shape: Shape, lengths: bool = True) -> Fit:
        """What the method can do within ``limit`` bytes: at the wanted batch and length, the largest
        batch at that length, and the largest length (in steps of eight tokens) at that batch."""
        wanted = self.trace(name, shape, replay=True)
        return Fit(
            model=self.bench.name,
            memory=memory,
            method=name,
            seq=shape[1],
            wanted_batch=shape[0],
            units=wanted.flops / self.bench.forward_flops(*shape),
            bytes=wanted.bytes,
            allocated=wanted.allocated,
            reserved=wanted.reserved,
            batch=self._largest(name, limit, shape, False),
            length=self._largest(name, limit, shape, True) if lengths else None,
        )

    def _largest(self, name: str, limit: float, shape: Shape, long: bool) -> int:
        """The largest length or batch beside the other one of ``shape``: from the curve through a
        trace at ``shape`` and one where the bytes of a step would meet the limit if all grew alike;
        where there is no curve, by further traces."""
        batch, length = shape
        grain, most = (STEP, self.bench.longest // STEP) if long else (1, LARGEST)

        def at(n: int) -> Shape:
            return (batch, grain * n) if long else (n, length)

        n = max(2, (length if long else batch) // grain)  # one row has no padding, so no mask
        start = self.trace(name, at(n))
        guess = int(n * (limit - start.resident) / (start.bytes - start.resident))
        guess = min(max(guess, 2), most)
        guess += (guess == n) * (1 if n < most else -1)
        if (name, shape, long) not in self._curves:
            other = self.trace(name, at(guess))
            curve = between(start, n, other, guess)
            if long and self.bench.form == "image_text":  # images shrink with short texts
                curve = None
            self._curves[name, shape, long] = curve
        curve = self._curves[name, shape, long]

        def traced(x: int) -> float:
            return self.trace(name, at(x)).bytes

        def bytes_at(x: int) -> float:
            known = (x < 2 and not long) or (name, at(x)) in self._known
            return traced(x) if curve is None or known else curve(x)[0]

        found = largest(bytes_at, limit, most, (n, guess))
        if curve is not None and found and not curve(found)[1]:
            found = largest(traced, limit, most, (found, found + 1))
        return grain * found


_search: Fitting | None = None  # of this process and of those that it forks


def _fits(asked: tuple[str, Mapping[str, int], Shape, bool]) -> list[Fit]:
    name, limits, shape, lengths = asked
    assert _search is not None
    return [_search.fit(name, card, limit, shape, lengths) for card, limit in limits.items()]


def fits(
    search: Fitting, limits: Mapping[str, int], shape: Shape, lengths: bool
) -> Iterator[list[Fit]]:
    """What each method can do on each card, one method after the other; on several cores in processes
    that are forked with the model that is there."""
    global _search
    _search = search
    asked = [(name, limits, shape, lengths) for name in search.methods]
    workers = min(len(asked), os.cpu_count() or 1) if hasattr(os, "fork") else 1
    if workers == 1:
        yield from map(_fits, asked)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_fits, asked)


def cheapest_plan(plan: Plan, found: Sequence[Fit], limit: float) -> Fit | None:
    """The backpropagation entry with the fewest forward units among those that fit."""
    entries = plan.catalog.methods
    usable = [
        fit
        for fit in found
        if isinstance(entries[fit.method].estimator, BackpropSpec)
        and entries[fit.method].accumulate == 1
        and fit.bytes <= limit
    ]
    return min(usable, key=lambda fit: (fit.units, fit.bytes), default=None)


def models_that_fit(
    models: Mapping[str, ModelEntry], methods: Mapping[str, MethodEntry], shape: Shape
) -> list[Needs]:
    """What each method needs on each model, by size: what is the largest model that each can train?
    (The question of arXiv 2511.11362, which compares with BP that keeps everything.)"""
    found = []
    for name, entry in models.items():
        bench = Bench(entry, name=name)
        costs = {key: bench.cost(key, method, *shape) for key, method in methods.items()}
        found.append(
            Needs(
                model=name,
                parameters=bench.parameters,
                bytes={key: cost.bytes for key, cost in costs.items()},
                units={key: cost.forward_units for key, cost in costs.items()},
            )
        )
    return sorted(found, key=lambda needs: needs.parameters)
