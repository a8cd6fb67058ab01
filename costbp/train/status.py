"""How far a study is: runs done, running, waiting and failed, and the time left."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from costbp.config.study import Cell, Plan
from costbp.files import lock
from costbp.train.record import PROGRESS, read_record

STATES = ("done", "running", "interrupted", "waiting", "failed", "damaged")


@dataclass(frozen=True)
class RunStatus:
    """One run's state; ``seconds`` is the time spent, ``fraction`` the share of the budget."""

    cell: Cell
    seed: int
    state: str
    fraction: float
    seconds: float
    outcome: str = ""


def statuses(plan: Plan) -> list[RunStatus]:
    """The state of every run of a study, read from the store."""
    found = []
    for cell in plan.cells():
        for spec in plan.specs(cell):
            folder = spec.folder(plan.study.paths.store)
            state, fraction, seconds, outcome = "waiting", 0.0, 0.0, ""
            try:
                record = read_record(folder)
            except ValueError:
                state, record = "damaged", None
            if record is not None:
                state = "failed" if record.outcome == "failed" else "done"
                fraction, outcome = 1.0, record.outcome
                seconds = record.summary.seconds + record.summary.evaluation_seconds
            elif folder.is_dir() and state == "waiting":
                state, fraction, seconds = "interrupted", *_progress(folder / PROGRESS)
                with lock(folder / ".lock", wait=False) as free:
                    state = state if free else "running"
            found.append(RunStatus(cell, spec.seed, state, fraction, seconds, outcome))
    return found


def _progress(path: Path) -> tuple[float, float]:
    try:
        data = json.loads(path.read_text())
        return float(data["fraction"]), float(data["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0, 0.0


def seconds_left(found: list[RunStatus]) -> float | None:
    """Computing seconds left, from the mean of finished runs of the same model, task and method,
    else of the same model and task, else of all; None before any run has finished."""

    def known(length: int) -> dict[tuple[str, ...], float]:
        groups: dict[tuple[str, ...], list[float]] = {}
        for run in found:
            if run.state == "done":
                groups.setdefault(run.cell[:length], []).append(run.seconds)
        return {key: statistics.mean(values) for key, values in groups.items()}

    levels = [(3, known(3)), (2, known(2)), (0, known(0))]
    if not levels[-1][1]:
        return None
    left = 0.0
    for run in found:
        if run.state != "done":
            means = (table.get(run.cell[:length]) for length, table in levels)
            whole = next(value for value in means if value is not None)
            left += whole * (1 - run.fraction if run.state in ("running", "interrupted") else 1)
    return left


def counts(found: list[RunStatus]) -> dict[str, int]:
    """Runs by state, in the order of ``STATES``."""
    tally = Counter(run.state for run in found)
    return {state: tally[state] for state in STATES if tally[state]}
