"""What a benchmark leaves behind: costs of methods, and checks of them against targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["flops", "memory", "time", "value"]

FLOPS = "FLOPs, in forwards"
TIME = "time, in forwards"
PEAK = "peak, in forward peaks"


@dataclass(frozen=True)
class Cost:
    """One method on one case, relative to a no-grad forward of the same batch.

    Attributes:
        today: whether it is what people use today rather than ours.
        units: FLOPs of matrix products.
        times: wall time, median of per-round ratios; None where it wasn't timed.
        peak: live bytes beyond weights; None where they can't be counted.
    """

    entry: str
    case: str
    method: str
    today: bool
    units: float
    times: float | None
    peak: float | None


@dataclass(frozen=True)
class Check:
    """One measured number and what it is held against.

    Attributes:
        what: the method or the comparison.
        quantity: what is measured of it, with its unit.
        kind: misses fail the run unless they are times.
        target: a bound, None where the number is only reported.
        at_least: whether the bound is a lower one.
    """

    what: str
    quantity: str
    kind: Kind
    case: str
    measured: float
    target: float | None
    at_least: bool = False

    @property
    def ok(self) -> bool:
        if self.target is None:
            return True
        return self.measured >= self.target if self.at_least else self.measured <= self.target

    @property
    def bound(self) -> str:
        """The target as text."""
        if self.target is None:
            return "-"
        return f"{'>=' if self.at_least else '<='} {self.target:g}"


@dataclass
class Results:
    """Everything a run found, in the order of running."""

    costs: list[Cost] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def misses(self, strict: bool) -> list[Check]:
        """Checks that failed; times only if ``strict``."""
        return [c for c in self.checks if not c.ok and (strict or c.kind != "time")]

    def grouped(self) -> dict[tuple[str, str], list[Check]]:
        """Checks by (what, quantity), over cases."""
        groups: dict[tuple[str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.what, check.quantity), []).append(check)
        return groups

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "costs": [asdict(cost) for cost in self.costs],
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
            "notes": self.notes,
        }
