"""What fits into a memory: the largest batch, length and model of each method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from costbp.config.methods import BackpropSpec, MethodEntry
from costbp.config.study import Plan
from costbp.cost.trace import Bench

STEP = 8  # tokens: the grain in which lengths are searched
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
    _known: dict[tuple[str, int, int], dict[str, Any]] = field(default_factory=dict)

    def cost(self, name: str, batch: int, length: int) -> dict[str, Any]:
        key = (name, batch, length)
        if key not in self._known:
            self._known[key] = self.bench.cost(name, self.methods[name], batch, length)
        return self._known[key]

    def bytes(self, name: str, batch: int, length: int) -> int:
        """All bytes at the peak of a step, weights included."""
        return sum(self.cost(name, batch, length)["peak_by_category"].values())

    def fit(
        self, name: str, limit: float, batch: int, length: int, lengths: bool = True
    ) -> dict[str, Any]:
        """What the method can do within ``limit`` bytes.

        Returns:
            ``units`` and ``bytes`` of a step at the wanted batch and length; ``batch``, the largest
            at that length, and ``length``, the largest at that batch (in steps of eight tokens; None
            if not searched); 0 where none fits.
        """
        found = None
        if lengths:
            most = self.bench.longest // STEP
            found = STEP * largest(lambda n: self.bytes(name, batch, STEP * n), limit, most)
        return {
            "method": name,
            "seq": length,
            "wanted_batch": batch,
            "units": self.cost(name, batch, length)["forward_units"],
            "bytes": self.bytes(name, batch, length),
            "batch": largest(lambda n: self.bytes(name, n, length), limit, LARGEST),
            "length": found,
        }


def cheapest_plan(
    plan: Plan, rows: Sequence[Mapping[str, Any]], limit: float
) -> Mapping[str, Any] | None:
    """The backpropagation entry with the fewest forward units among those that fit."""
    entries = plan.catalog.methods
    usable = [
        row
        for row in rows
        if isinstance(entries[row["method"]].estimator, BackpropSpec)
        and entries[row["method"]].accumulate == 1
        and row["bytes"] <= limit
    ]
    return min(usable, key=lambda row: (row["units"], row["bytes"]), default=None)


def models_that_fit(
    plan: Plan,
    names: Iterable[str],
    methods: Mapping[str, MethodEntry],
    batch: int,
    length: int,
) -> list[dict[str, Any]]:
    """Bytes of a step of each method on each model, by size: what is the largest model that each
    can train? (The question of arXiv 2511.11362, which compares with BP that keeps everything.)"""
    rows = []
    for name in names:
        bench = Bench(plan.catalog.models[name])
        costs = {key: bench.cost(key, method, batch, length) for key, method in methods.items()}
        rows.append(
            {
                "model": name,
                "parameters": bench.parameters,
                "bytes": {k: sum(c["peak_by_category"].values()) for k, c in costs.items()},
                "units": {k: c["forward_units"] for k, c in costs.items()},
            }
        )
    return sorted(rows, key=lambda row: int(row["parameters"]))
