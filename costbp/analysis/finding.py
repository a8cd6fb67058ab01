"""What the runs say about a claim, and the fixed rules that word the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

DECIDED = 0.5  # share of the comparisons that must be decided
DECISIVE = 0.75  # share of the decided comparisons that settles a verdict


@dataclass
class Finding:
    """What the runs say about a claim.

    Attributes:
        measured: our value with its unit, as text.
        value: the same as a number, None where nothing could be compared.
        supporting, opposing, undecided: comparisons by what they say.
        definition: what was compared, in one sentence.
    """

    definition: str
    measured: str = "nothing to compare"
    value: float | None = None
    supporting: list[str] = field(default_factory=list)
    opposing: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    def sort(self, name: str, verdict: bool | None) -> None:
        """File a comparison under what it says."""
        {True: self.supporting, False: self.opposing, None: self.undecided}[verdict].append(name)

    @property
    def verdict(self) -> str:
        """``holds here``, ``does not hold here`` or ``inconclusive here``."""
        decided = len(self.supporting) + len(self.opposing)
        total = decided + len(self.undecided)
        if not decided or decided / total < DECIDED:
            return "inconclusive here"
        share = len(self.supporting) / decided
        if share >= DECISIVE:
            return "holds here"
        return "does not hold here" if share <= 1 - DECISIVE else "inconclusive here"


def ledger_word(verdict: str, scale: str) -> str:
    """The public vocabulary: verified, falsified, toy (reduced scale), inconclusive."""
    if verdict.startswith("inconclusive"):
        return "inconclusive"
    if scale != "full":
        return "toy"
    return "verified" if verdict.startswith("holds") else "falsified"


def how_worded(scale: str) -> str:
    """How verdict and ledger word follow from the comparisons, in words."""
    words = "verified or falsified" if scale == "full" else "toy, whichever way it is decided"
    return (
        f"A claim holds here when at least {100 * DECIDED:g} % of its comparisons are decided and "
        f"{100 * DECISIVE:g} % of those are for it, and doesn't when as many are against it. At {scale} "
        f"scale the ledger calls a decided claim {words}."
    )
