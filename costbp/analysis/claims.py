"""Claims held against the runs: the claims file, and every claim with its computed verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from costbp.analysis.frames import Frames
from costbp.analysis.readings import READINGS
from costbp.analysis.verdict import Claim, ledger_word
from costbp.config.entries import Strict
from costbp.config.load import read_yaml, validate
from costbp.config.study import Plan
from costbp.errors import UserError, suggest


class _ClaimsFile(Strict):
    claims: dict[str, Claim]


def load_claims(path: Path) -> dict[str, Claim]:
    """Claims by id.

    Raises:
        UserError: a key or a reading is not known.
    """
    data = {"claims": read_yaml(path)}
    claims = validate(_ClaimsFile, data, [(path, data)]).claims
    for name, claim in claims.items():
        if claim.reading not in READINGS:
            raise UserError(
                f"{path}: {name}.reading = '{claim.reading}' is not known; "
                f"{suggest(claim.reading, READINGS)}"
            )
    return claims


def judge(plan: Plan, frames: Frames) -> list[dict[str, Any]]:
    """Every claim with its reading and verdict, ready for JSON."""
    results = []
    known = plan.catalog.methods
    for name, claim in load_claims(plan.study.claims).items():
        for method in (*claim.baselines, *claim.baselines.values()):
            if method not in known:
                raise UserError(
                    f"{plan.study.claims}: {name}.baselines: '{method}' is no method of the "
                    f"catalog; {suggest(method, known)}"
                )
        reading = READINGS[claim.reading](plan, frames, claim)
        results.append(
            {
                "id": name,
                **claim.model_dump(mode="json"),
                "definition": reading.definition,
                "measured": reading.measured,
                "value": reading.value,
                "verdict": reading.verdict,
                "ledger": ledger_word(reading.verdict, plan.study.scale),
                "scale": plan.study.scale,
                "for": reading.supporting,
                "against": reading.opposing,
                "undecided": reading.undecided,
            }
        )
    return results
