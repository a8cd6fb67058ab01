"""What the runs say about a claim, and the fixed rules that word the verdict.

Direction and size are judged apart. Direction: comparisons are decided at ``ALPHA`` after Holm's
correction, and their shares settle it. Size ("up to"): the largest comparison's simultaneous bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from costbp.analysis.arms import BLOCKED, SEEDS, Kind, LeftOut
from costbp.analysis.statistics import ALPHA, POWER, Sample, aggregate, holm, largest
from costbp.config.claims import Magnitude, Unit
from costbp.config.study import Cell

DECIDED = 0.5  # share of the comparisons that must be decided
DECISIVE = 0.75  # share of the decided comparisons that settles a verdict
MANY = 200  # seeds, beyond which more of them are no answer
Side = Literal["for", "against", "undecided"]
Direction = Literal["for", "against", "undecided"] | None
Size = Literal["reached", "not reached", "undecided"] | None


@dataclass(frozen=True)
class Scale:
    """How a sample's scale reads in a unit.

    Attributes:
        log: whether samples are logarithms of ratios.
        of: number in the unit from a number of the sample's scale, rising.
        words: format of such a number.
    """

    log: bool
    of: Callable[[float], float]
    words: str

    def text(self, value: float) -> str:
        return self.words.format(self.of(value))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if value > -700 else 0.0


SCALES: Mapping[str, Scale] = {
    "points": Scale(False, lambda x: 100 * x, "{:+.1f} points"),
    "percent": Scale(True, lambda x: 100 * (_exp(x) - 1), "{:+.1f} %"),
    "percent less": Scale(True, lambda x: 100 * (1 - _exp(-x)), "{:.1f} % less"),
    "percent faster": Scale(True, lambda x: 100 * (_exp(x) - 1), "{:.1f} % faster"),
    "x": Scale(True, _exp, "{:.3g}x"),
    "points per tenfold": Scale(False, lambda x: 100 * x, "{:+.1f} points per tenfold"),
    "below 1": Scale(False, lambda x: x, "{:.2f} below an exponent of 1"),
    "spikes": Scale(False, lambda x: x, "{:+.2f} spikes a thousand steps"),
    "models": Scale(False, lambda x: x, "{:+.0f} models"),
    "": Scale(False, lambda x: x, "{:g}"),
}


@dataclass(frozen=True)
class Measured:
    """A comparison's outcome.

    Attributes:
        sample: positive where it speaks for the claim.
        text: what was measured, with its unit.
        sizes: for "up to": samples by unit's scale (log or not), where they differ from ``sample``.
        shift: what to add to ``sample`` for what was measured: a margin, a bound of a ratio.
    """

    sample: Sample
    text: str
    sizes: Mapping[bool, list[Sample]] = field(default_factory=dict)
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row(Measured):
    """One comparison that counts: its names and runs."""

    name: str
    model: str
    task: str
    budget: str
    method: str
    against: str
    folders: list[str]


@dataclass
class Finding:
    """What the runs say about a claim.

    Attributes:
        definition: what was compared, in one sentence.
        clause: what a reader may conclude where the claim's direction holds, without numbers.
        unit: of estimates, a key of ``SCALES``.
        takes: what a study needs where it has nothing to compare.
    """

    definition: str
    clause: str
    unit: str
    magnitude: Magnitude | None = None
    takes: str = ""
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, measured: Measured, name: str, cell: Cell, against: str, runs: list[str]) -> None:
        """File what was measured in a cell."""
        self.rows.append(
            Row(**vars(measured), name=name, **cell._asdict(), against=against, folders=runs)
        )

    # --- direction -------------------------------------------------------------------------------

    @property
    def sides(self) -> list[Side]:
        """Of each row."""
        adjusted = holm([row.sample.p for row in self.rows])
        found: list[Side] = []
        for row, p in zip(self.rows, adjusted, strict=True):
            mean, sample = row.sample.mean, row.sample
            bounded = sample.at_most if mean > 0 else sample.at_least
            decided = p < ALPHA and mean != 0 and not bounded
            found.append("undecided" if not decided else "for" if mean > 0 else "against")
        return found

    @property
    def blocked(self) -> list[LeftOut]:
        """Comparisons that more runs would bring."""
        return [part for part in self.left_out if part.kind in BLOCKED]

    @property
    def direction(self) -> Direction:
        if not self.rows:
            return None
        sides = self.sides
        decided = len(sides) - sides.count("undecided")
        if not decided or decided / (len(sides) + len(self.blocked)) < DECIDED:
            return "undecided"
        share = sides.count("for") / decided
        return "for" if share >= DECISIVE else "against" if share <= 1 - DECISIVE else "undecided"

    # --- size ------------------------------------------------------------------------------------

    def largest(self, unit: str) -> tuple[float, float, float]:
        """The largest comparison in a unit, with simultaneous bounds."""
        scale = SCALES[unit]
        found = [s for row in self.rows for s in row.sizes.get(scale.log, [row.sample])]
        return largest(found)

    def size(self, unit: Unit) -> Size:
        """Whether the largest reaches what is claimed, the claim read in this unit."""
        assert self.magnitude is not None
        _, low, high = map(SCALES[unit].of, self.largest(unit))
        if low >= self.magnitude.value:
            return "reached"
        return "not reached" if high < self.magnitude.value else "undecided"

    @property
    def reached(self) -> Size:
        """Whether the claimed size is reached; None where none is claimed. Undecided where readings
        of its unit disagree."""
        if self.magnitude is None or not self.rows:
            return None
        found = {self.size(unit) for unit in self.magnitude.units}
        return found.pop() if len(found) == 1 else "undecided"

    @property
    def value(self) -> tuple[float, float | None, float | None] | None:
        """In the finding's unit: the largest with simultaneous bounds where a size is claimed, else
        the mean over comparisons."""
        if not self.rows:
            return None
        scale = SCALES[self.unit]
        if self.magnitude is not None:
            found: tuple[float | None, ...] = self.largest(self.unit)
        else:
            found = aggregate([row.sample.mean + row.shift for row in self.rows])
        numbers = [None if x is None or math.isinf(x) else scale.of(x) for x in found]
        return numbers[0] or 0.0, numbers[1], numbers[2]

    # --- words -----------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """``holds here``, ``does not hold here``, ``inconclusive here``, ``untuned`` or ``not tested
        here``."""
        words = {"for": "holds here", "against": "does not hold here"}
        if self.direction in words:
            return words[str(self.direction)]
        if any(part.kind == "untuned" for part in self.left_out) and not (
            set(self.sides) - {"undecided"}
        ):
            return "untuned"
        tried = self.rows or any(part.kind not in ("plain", "same") for part in self.left_out)
        return "inconclusive here" if tried else "not tested here"

    def ledger(self, scale: str) -> str:
        """The public vocabulary: verified, falsified, toy (reduced scale), inconclusive; or not
        tested. A size that is claimed has to be reached, too, for ``verified``."""
        if self.verdict == "not tested here":
            return "not tested"
        falsified, verified = self.direction == "against", self.direction == "for"
        if not falsified and not (verified and self.reached in (None, "reached")):
            return "inconclusive"
        if scale != "full":
            return "toy"
        return "falsified" if falsified else "verified"

    @property
    def measured(self) -> str:
        """The range of all comparisons."""
        if not self.rows:
            return "nothing to compare"
        scale = SCALES[self.unit]
        means = sorted(row.sample.mean + row.shift for row in self.rows)
        texts = list(dict.fromkeys(scale.text(x) for x in (means[0], means[-1])))
        bound = any(r.sample.at_least and r.sample.mean + r.shift == means[-1] for r in self.rows)
        texts[-1] = "at least " * bound + texts[-1]
        return " to ".join(texts)

    @property
    def conclusion(self) -> str:
        """What a reader may conclude, with numbers."""
        if not self.rows:
            reasons = dict.fromkeys(part.reason for part in self.left_out)
            why = f": {next(iter(reasons))}" if reasons else ""
            more = f" (and {len(reasons) - 1} further reasons)" if len(reasons) > 1 else ""
            return f"Nothing can be said{why}{more}."
        sides, total = self.sides, len(self.rows)
        lead = {
            "for": "",
            "against": "it does not hold here that ",
            "undecided": "it stays undecided whether ",
        }
        tally = ", ".join(f"{sides.count(s)} {s}" for s in ("for", "against", "undecided"))
        head = lead[str(self.direction)] + self.clause
        text = f"{head[0].upper()}{head[1:]}: {self.measured} in {total} "
        text += f"comparison{'s' * (total > 1)} ({tally})"
        return f"{text}{self._of_size()}."

    def _of_size(self) -> str:
        if self.magnitude is None or self.direction != "for":
            return ""
        parts = []
        for unit in self.magnitude.units:
            scale, (value, low, high) = SCALES[unit], self.largest(unit)
            ends = [scale.text(x) if math.isfinite(x) else "open" for x in (low, high)]
            inside = "" if low == high else f" (95 %: {ends[0]} to {ends[1]})"
            claimed = f"{self.magnitude.value:g} {unit}".replace(" x", "x")
            words = {"undecided": "it is undecided whether that reaches", "reached": "reaching"}
            how = words.get(str(self.size(unit)), "not reaching")
            parts.append(f"the largest is {scale.text(value)}{inside}, {how} the claimed {claimed}")
        return "; " + "; ".join(parts)

    @property
    def needs(self) -> str:
        """What would decide it; empty where it is decided, size and all."""
        if self.direction in ("for", "against"):
            return self._size_needs() if self.direction == "for" else ""
        kinds: dict[Kind, LeftOut] = {part.kind: part for part in reversed(self.left_out)}
        if not self.rows or self.verdict == "untuned":
            mend = _MENDS.get(next((k for k in _MENDS if k in kinds), ""), self.takes)
            return mend or "a study that has what is compared, on a model of several trained blocks"
        sides = self.sides
        decided = len(sides) - sides.count("undecided")
        total = len(sides) + len(self.blocked)
        if decided / total >= DECIDED:
            return (
                f"decided comparisons disagree ({sides.count('for')} for, {sides.count('against')} "
                "against): a narrower claim, not more seeds"
            )
        if len(sides) / total < DECIDED:
            return _MENDS[next(k for k in _MENDS if k in kinds)]
        wanted = math.ceil(DECIDED * total) - decided
        open_ = [row for row, side in zip(self.rows, sides, strict=True) if side == "undecided"]
        if all(row.sample.exact for row in open_):
            return self.takes or "comparisons that are no ties: they are counted, and stay so"
        seeds = sorted(row.sample.seeds_needed(ALPHA / len(self.rows)) for row in open_)[wanted - 1]
        if seeds > MANY:
            return (
                f"a larger effect, so a larger budget or another model: at this spread more than "
                f"{MANY} seeds would be needed"
            )
        return f"about {seeds:.0f} seeds (power {POWER:g} at the effect and spread seen here)"

    def _size_needs(self) -> str:
        if self.magnitude is None or self.reached == "reached":
            return ""
        found = [self.size(unit) for unit in self.magnitude.units]
        if len(set(found)) > 1:
            return (
                f"for its size: which unit the source means ({' or '.join(self.magnitude.units)})"
            )
        if self.reached == "undecided":
            return "for its size: more seeds, whose interval leaves the claimed value out"
        return "for its size: a model or task where the difference is as large as claimed"


_MENDS: Mapping[Any, str] = {  # in order of what comes first
    "missing": "the missing runs: run `snakemake` to the end",
    "failed": "the failed runs: mend their cause and run `snakemake` again",
    "untuned": "tuned learning rates: `snakemake tune`, with equal trials for every method",
    "seeds": f"{SEEDS} seeds of each experiment",
    "diverged": "a smaller largest rate in the search: methods diverged",
    "reach": "a longer budget: a target was reached by neither method",
    "unlearnt": "a longer budget, or a task on which the methods leave their start",
    "memory": "a budget with a memory ceiling that both methods keep under",
    "unfit": "a larger device or a smaller model",
}


def how_worded(scale: str) -> str:
    """How verdict and ledger word follow from the comparisons, in words."""
    words = "verified or falsified" if scale == "full" else "toy, whichever way it is decided"
    return (
        f"Comparisons are paired over at least {SEEDS} seeds and decided at {ALPHA:g} after Holm's "
        f"correction. A claim holds here when at least {100 * DECIDED:g} % of its comparisons are "
        f"decided and {100 * DECISIVE:g} % of those are for it, and doesn't when as many are against "
        "it. A claimed size is reached where the simultaneous lower bound of the largest comparison "
        f"reaches it; a claim whose size is not reached stays inconclusive in the ledger. At {scale} "
        f"scale the ledger calls a decided claim {words}."
    )
