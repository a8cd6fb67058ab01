"""Claims held against the runs: every claim of a plan with its computed verdict."""

from __future__ import annotations

from typing import Any

from costbp.analysis.finding import ledger_word
from costbp.analysis.frames import Frames
from costbp.analysis.readings import READINGS
from costbp.config.study import Plan


def judge(plan: Plan, frames: Frames) -> list[dict[str, Any]]:
    """Every claim with its finding and verdict, ready for JSON."""
    results = []
    for name, claim in plan.claims.items():
        finding = READINGS[claim.reading](plan, frames, claim)
        results.append(
            {
                "id": name,
                **claim.model_dump(mode="json"),
                "definition": finding.definition,
                "measured": finding.measured,
                "value": finding.value,
                "verdict": finding.verdict,
                "ledger": ledger_word(finding.verdict, plan.study.scale),
                "scale": plan.study.scale,
                "for": finding.supporting,
                "against": finding.opposing,
                "undecided": finding.undecided,
            }
        )
    return results
