"""The readings of claims: what the runs say, comparison by comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from costbp.analysis.arms import LEARNT, Evidence, LeftOut
from costbp.analysis.finding import Finding
from costbp.analysis.readings.accuracy import accuracy_gap, learns, rankings, spikes
from costbp.analysis.readings.convergence import slowdown_over_d, to_target
from costbp.analysis.readings.costs import largest_model, step_cost
from costbp.analysis.readings.scale import gap_over_scale
from costbp.config.claims import AbsentClaim

__all__ = ["LEARNT", "READINGS"]


def none(evidence: Evidence, claim: AbsentClaim) -> Finding:
    """No run here tests it."""
    why = [LeftOut(claim.title, "plain", claim.reason)]
    return Finding("No run of this project tests it.", "", "", takes=claim.takes, left_out=why)


READINGS: Mapping[str, Callable[[Evidence, Any], Finding]] = {
    function.__name__: function
    for function in (
        accuracy_gap,
        rankings,
        learns,
        spikes,
        to_target,
        slowdown_over_d,
        gap_over_scale,
        step_cost,
        largest_model,
        none,
    )
}
