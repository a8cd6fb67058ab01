"""What fits into a memory: the largest batch, length and model of each method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from costbp.config.catalog import ModelEntry
from costbp.config.methods import BackpropSpec, MethodEntry
from costbp.config.study import Plan
from costbp.cost.bench import Bench
from costbp.cost.record import CostRecord, Fit, Needs

STEP = 8  # tokens: the grain in which lengths are searched
Shape = tuple[int, int]  # examples a batch, tokens an example
LARGEST = 2**16  # a batch beyond this is no longer a question of memory


def largest(bytes_at: Callable[[int], float], limit: float, most: int) -> int:
    """The largest n in 1..most with ``bytes_at(n) <= limit``; 0 if there is none.

    ``bytes_at`` must not fall with n. Each guess is where the parabola through the last three
    points (at first the line through two) meets the limit: bytes are affine in the batch and, where
    attention is written out, quadratic in the length, so about six calls decide.
    """
    fits, failed = 0, most + 1
    points: dict[int, float] = {}
    guess = 1
    while failed - fits > 1:
        guess = min(max(guess, fits + 1), failed - 1)
        points[guess] = bytes_at(guess)
        if points[guess] <= limit:
            fits = guess
        else:
            failed = guess
        guess = 2 if len(points) == 1 else _crossing(list(points.items())[-3:], limit)
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


@dataclass
class Fitting:
    """Searches on one bench; a step is traced once per method, batch and length."""

    bench: Bench
    methods: Mapping[str, MethodEntry]
    _known: dict[tuple[str, int, int], CostRecord] = field(default_factory=dict)

    def cost(self, name: str, batch: int, length: int) -> CostRecord:
        key = (name, batch, length)
        if key not in self._known:
            self._known[key] = self.bench.cost(name, self.methods[name], batch, length)
        return self._known[key]

    def fit(self, name: str, memory: str, limit: float, shape: Shape, lengths: bool = True) -> Fit:
        """What the method can do within ``limit`` bytes: at the wanted batch and length, the largest
        batch at that length, and the largest length (in steps of eight tokens) at that batch."""
        batch, length = shape

        def bytes_at(batch: int, length: int) -> int:
            return self.cost(name, batch, length).bytes

        longest = None
        if lengths:
            most = self.bench.longest // STEP
            longest = STEP * largest(lambda n: bytes_at(batch, STEP * n), limit, most)
        wanted = self.cost(name, batch, length)
        return Fit(
            model=self.bench.name,
            memory=memory,
            method=name,
            seq=length,
            wanted_batch=batch,
            units=wanted.forward_units,
            bytes=wanted.bytes,
            batch=largest(lambda n: bytes_at(n, length), limit, LARGEST),
            length=longest,
        )


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
