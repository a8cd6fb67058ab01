"""Claims held against the runs: ``claims.json`` and ``claims.md``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from costbp.analysis.arms import Evidence
from costbp.analysis.finding import SCALES, Finding, how_worded
from costbp.analysis.frames import Frames
from costbp.analysis.readings import READINGS
from costbp.analysis.statistics import holm
from costbp.analysis.tables import SETTING, markdown, scale_line
from costbp.config.claims import traces
from costbp.config.study import Cell, Plan
from costbp.cost.record import read_costs
from costbp.files import write_json, write_text
from costbp.train.record import ENOUGH

COLUMNS = {
    "title": "Claim",
    "claimed": "Claimed",
    "measured": "Measured here",
    "verdict": "Verdict",
    "ledger": "Ledger",
}


def judge(evidence: Evidence) -> list[dict[str, Any]]:
    """Every claim with its finding and verdict, ready for JSON."""
    results = []
    for name, claim in evidence.plan.claims.items():
        finding: Finding = READINGS[claim.reading](evidence, claim)
        value, low, high = finding.value or (None, None, None)
        results.append(
            {
                "id": name,
                **claim.model_dump(mode="json"),
                "definition": finding.definition,
                "measured": finding.measured,
                "value": value,
                "low": low,
                "high": high,
                "unit": finding.unit,
                "direction": finding.direction,
                "magnitude": finding.reached,
                "claimed_size": finding.magnitude and finding.magnitude.model_dump(mode="json"),
                "verdict": finding.verdict,
                "ledger": finding.ledger(evidence.plan.study.scale),
                "conclusion": finding.conclusion,
                "needs": finding.needs,
                "rows": _rows(finding),
                "left_out": [{"name": x.name, "reason": x.reason} for x in finding.left_out],
            }
        )
    return results


def _rows(finding: Finding) -> list[dict[str, Any]]:
    scale = SCALES[finding.unit]
    adjusted = holm([row.sample.p for row in finding.rows])
    found = []
    for row, side, p in zip(finding.rows, finding.sides, adjusted, strict=True):
        numbers = [x + row.shift for x in (row.sample.mean, *row.sample.interval())]
        estimate, low, high = (scale.of(x) if math.isfinite(x) else None for x in numbers)
        found.append(
            {
                "name": row.name,
                **{key: getattr(row, key) for key in (*Cell._fields, "against")},
                "estimate": estimate,
                "low": low,
                "high": high,
                "p": p,
                "side": side,
                "text": row.text,
                "runs": row.folders,
            }
        )
    return found


def warnings(frames: Frames) -> list[str]:
    """What a reader must know of all comparisons."""
    found = [str(frames.missing)] if frames.missing else []
    commits = sorted(set(map(str, frames.runs.get("commit", []))))
    if len(commits) > 1:
        found.append(
            f"The runs were made at {len(commits)} commits of the code ({', '.join(commits)}): a "
            "difference may be the code's."
        )
    ended = frames.runs["outcome"].value_counts().drop("completed", errors="ignore")
    found += [
        f"{count} of {len(frames.runs)} runs ended as {str(outcome).replace('_', ' ')}."
        for outcome, count in ended.items()
    ]
    return found + _uneven(frames)


def _uneven(frames: Frames) -> list[str]:
    """Where methods of one setting have not spent the same of its budget."""
    found = []
    for names, group in frames.runs.groupby(SETTING, sort=False):
        shares = group.groupby("method", sort=False)["spent"].min()
        if len(short := shares[shares < ENOUGH * shares.max()]):
            told = ", ".join(f"{method} {100 * share:.0f} %" for method, share in short.items())
            found.append(
                f"{'/'.join(names)}: not all spent the same of the budget, since a further step would "
                f"have exceeded it: {told}, and others up to {100 * shares.max():.0f} %. Comparisons "
                "at equal units with these are not at equal units, to their disadvantage."
            )
    return found


def page(plan: Plan, claims: list[dict[str, Any]], notes: list[str]) -> str:
    """The claims in Markdown: an at-a-glance table, then each comparison."""
    table = pd.DataFrame(claims, columns=list(COLUMNS)).rename(columns=COLUMNS)
    lines = ["# Claims", "", scale_line(plan), "", how_worded(plan.study.scale)]
    lines += [line for note in notes for line in ("", note)]
    lines += ["", markdown(table).rstrip()]
    for claim in claims:
        lines += ["", f"## {claim['title']}: {claim['verdict']}", "", f"> {claim['statement']}", ""]
        lines += [f"Source: {claim['source']} ({claim['provenance']}).", "", claim["conclusion"]]
        if claim["needs"]:
            lines += ["", f"What would decide it: {claim['needs']}."]
        lines += ["", claim["definition"]]
        for side in ("for", "against", "undecided"):
            if texts := [f"- {r['name']}: {r['text']}" for r in claim["rows"] if r["side"] == side]:
                lines += ["", f"{side.capitalize()} ({len(texts)}):", "", *texts]
        if claim["left_out"]:
            lines += ["", f"Not compared ({len(claim['left_out'])}):", ""]
            lines += [f"- {part['name']}: {part['reason']}" for part in claim["left_out"]]
    return "\n".join(lines) + "\n"


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """``claims.json`` and ``claims.md``."""
    files = {name: plan.results / "claims" / name for name in traces(plan.claims)}
    tables = {
        name: pd.DataFrame(record.model_dump() for record in read_costs(path))
        for name, path in files.items()
        if path.exists()
    }
    claims, notes = judge(Evidence(plan, frames, tables)), warnings(frames)
    found = {"study": plan.name, "claims": claims, "warnings": notes}
    if frames.missing:
        found["missing"] = frames.missing.runs.to_dict("records")
    write_json(folder / "claims.json", found)
    write_text(folder / "claims.md", page(plan, claims, notes))
