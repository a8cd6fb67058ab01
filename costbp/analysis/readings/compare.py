"""What readings share: a walk over a claim's comparisons."""

from __future__ import annotations

from collections.abc import Callable

from costbp.analysis.arms import Evidence, LeftOut, Obstacle, Pair
from costbp.analysis.finding import Finding, Measured
from costbp.config.claims import Compared

Measure = Callable[[Pair], Measured | Obstacle]  # or why nothing was measured


def compare(evidence: Evidence, claim: Compared, finding: Finding, measure: Measure) -> Finding:
    """``finding`` with a row for each comparison of ``claim``; those that can't be compared are left
    out with the reason and, where there is one, the figure."""
    finding.magnitude, finding.takes = claim.magnitude, claim.takes or _takes(evidence, claim)
    for pair in evidence.pairs(claim):
        if isinstance(pair, LeftOut):
            finding.left_out.append(pair)
            continue
        why = pair.obstacle(claim)
        if why is not None and why[0] not in ("untuned", "seeds", "unlearnt", "memory"):
            finding.left_out.append(LeftOut(pair.name, *why))
            continue
        found = measure(pair) if pair.seeds else None
        if isinstance(found, tuple):
            finding.left_out.append(LeftOut(pair.name, *(why or found)))
        elif why is not None:
            shown = f" (measured: {found.text})" if found else ""
            finding.left_out.append(LeftOut(pair.name, why[0], why[1] + shown))
        elif found is not None:
            finding.add(found, pair.name, pair.better.cell, pair.worse.cell.method, pair.folders)
    return finding


def _takes(evidence: Evidence, claim: Compared) -> str:
    """What the study lacks of what a claim names."""
    cells = list(evidence.arms)
    lacking = []
    for kind in ("models", "tasks"):
        wanted = getattr(claim, kind) or ()
        if wanted and not {getattr(cell, kind[:-1]) for cell in cells} & set(wanted):
            lacking.append(f"{kind[:-1]} {' or '.join(wanted)}")
    used = {cell.method for cell in cells}
    named = [*(claim.methods or ()), *(name for pair in claim.baselines.items() for name in pair)]
    if missing := [name for name in named if name not in used]:
        lacking.append(f"method{'s' * (len(missing) > 1)} {', '.join(dict.fromkeys(missing))}")
    return f"a study with {' and '.join(lacking)}" if lacking else ""


def sides(evidence: Evidence, claim: Compared) -> tuple[str, str]:
    """Who is claimed to be better, and than whom, in words."""
    catalog = evidence.plan.catalog.methods
    if claim.baselines:
        return tuple(  # type: ignore[return-value]
            " or ".join(catalog[name].label for name in dict.fromkeys(part))
            for part in (claim.baselines, claim.baselines.values())
        )
    reference = catalog[evidence.reference].label
    names = {"fmad": "FmAD", "zo": "ZO", "bp": "BP"}
    others = " and ".join(names[family] for family in claim.families) + " methods"
    if claim.methods:
        others = " or ".join(catalog[name].label for name in claim.methods)
    return (reference, others) if claim.favours == "reference" else (others, reference)
