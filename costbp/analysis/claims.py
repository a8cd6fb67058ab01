"""Claims held against the runs: ``claims.json`` and ``claims.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from costbp.analysis.finding import ledger_word
from costbp.analysis.frames import Frames
from costbp.analysis.readings import READINGS
from costbp.analysis.tables import markdown, scale_line
from costbp.config.study import Plan
from costbp.files import write_json, write_text

COLUMNS = {
    "title": "Claim",
    "claimed": "Claimed",
    "measured": "Measured here",
    "verdict": "Verdict",
    "ledger": "Ledger",
}


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


def page(plan: Plan, claims: list[dict[str, Any]]) -> str:
    """The claims in Markdown: an at-a-glance table, then each comparison."""
    table = pd.DataFrame(claims, columns=list(COLUMNS)).rename(columns=COLUMNS)
    lines = ["# Claims", "", scale_line(plan), "", markdown(table).rstrip()]
    for claim in claims:
        lines += ["", f"## {claim['title']}: {claim['verdict']}", "", f"> {claim['statement']}", ""]
        lines += [f"Source: {claim['source']} ({claim['provenance']}).", "", claim["definition"]]
        for kind in ("for", "against", "undecided"):
            if claim[kind]:
                lines += ["", f"{kind.capitalize()} ({len(claim[kind])}):", ""]
                lines += [f"- {text}" for text in claim[kind]]
    return "\n".join(lines) + "\n"


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """``claims.json`` and ``claims.md``."""
    claims = judge(plan, frames)
    write_json(folder / "claims.json", {"study": plan.name, "claims": claims})
    write_text(folder / "claims.md", page(plan, claims))
