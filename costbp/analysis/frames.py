"""Records to tidy frames. Everything after this file works on these frames alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from costbp.config.study import Plan
from costbp.cost.record import read_costs
from costbp.errors import UserError
from costbp.files import atomic
from costbp.train.record import STEPS, Record, read_record

RUNS, CURVES, COSTS = "runs.parquet", "curves.parquet", "costs.parquet"
CELL = ["model", "task", "method", "budget"]
EVALUATED = ["step", "forward_units", "flops", "seconds", "validation_accuracy", "validation_loss"]


@dataclass(frozen=True)
class Frames:
    """A study's results.

    Attributes:
        runs: one row a run: cell, seed, family, outcome, optimiser, environment, summary figures.
        curves: one row an evaluation: cell, seed, step, forward_units, flops, seconds, and
            accuracy and loss on the validation split.
        costs: one row per (model, task, method): figures of one step, counted; its seconds and
            the allocator's bytes are those of the runs.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    costs: pd.DataFrame


def collect(plan: Plan) -> Frames:
    """Read a study's records and cost files.

    Raises:
        UserError: a run or a cost file is missing.
    """
    runs: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    for cell in plan.cells():
        for spec in plan.specs(cell):
            folder = spec.folder(plan.study.paths.store)
            try:
                record = read_record(folder)
            except ValueError as error:
                raise UserError(f"{error}; run `snakemake` again", 1) from error
            if record is None:
                raise UserError(f"{folder}: no record; run `snakemake` to compute it", 1)
            names = {**cell._asdict(), "seed": spec.seed}
            runs.append(
                {
                    **names,
                    "family": spec.method.family,
                    "hash": record.hash,
                    "outcome": record.outcome,
                    "message": record.message,
                    "optimizer": f"{spec.optimizer.name} {_rate(record):.2g}",
                    "finished": record.finished.isoformat(),
                    **record.environment,
                    **record.summary.figures(),
                }
            )
            steps = pd.read_parquet(folder / STEPS)
            found = steps.loc[steps["validation_accuracy"].notna(), EVALUATED]
            curves.append(found.assign(**names))
    costs: list[dict[str, Any]] = [
        cost.model_dump()
        for model, task in plan.pairs()
        for cost in read_costs(plan.results / "cost" / model / f"{task}.json")
    ]
    known = [curve for curve in curves if len(curve)] or curves[:1]  # a run may have ended before
    table = pd.DataFrame(runs)
    return Frames(table, pd.concat(known, ignore_index=True), _measured(pd.DataFrame(costs), table))


def _rate(record: Record) -> float:
    """The learning rate as it was used; a run that never began has none of its own."""
    used = record.summary.learning_rate
    return record.spec.optimizer.lr if used is None else used


MEASURED = {  # by the runs: a column of costs, and how it follows from the runs'
    "seconds": ("step_seconds", "mean"),
    "forward_seconds": ("forward_seconds", "mean"),
    "predicted_bytes": ("predicted_bytes", "max"),
    "allocated_bytes": ("allocated_bytes", "max"),
    "reserved_bytes": ("reserved_bytes", "max"),
}


def _measured(costs: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Costs with what the runs of each (model, task, method) took."""
    keys = CELL[:3]
    columns = {source: pd.to_numeric(runs[source]) for source, _ in MEASURED.values()}
    found = runs.assign(**columns).groupby(keys, sort=False).agg(**MEASURED).reset_index()
    return costs.drop(columns=list(MEASURED), errors="ignore").merge(found, on=keys, how="left")


def save(frames: Frames, folder: Path) -> None:
    """Store the frames as parquet files."""
    for name, frame in ((RUNS, frames.runs), (CURVES, frames.curves), (COSTS, frames.costs)):
        with atomic(folder / name) as temporary:
            frame.to_parquet(temporary, index=False)


def load(folder: Path) -> Frames:
    """Frames stored by ``save``.

    Raises:
        UserError: they are not there.
    """
    try:
        return Frames(*(pd.read_parquet(folder / name) for name in (RUNS, CURVES, COSTS)))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: results are not aggregated yet; run `costbp aggregate`"
        ) from error


def at_units(curves: pd.DataFrame, units: float) -> pd.DataFrame:
    """Validation accuracy of each run at ``units`` forward units, linear between evaluations; a run
    that was first evaluated later is left out."""
    rows = []
    for names, curve in curves.groupby([*CELL, "seed"], sort=False):
        curve = curve.sort_values("forward_units")
        inside = curve[curve["forward_units"] <= units]
        after = curve[curve["forward_units"] > units]
        if inside.empty:
            continue
        accuracy = inside["validation_accuracy"].iloc[-1]
        if len(after):
            x0, x1 = inside["forward_units"].iloc[-1], after["forward_units"].iloc[0]
            y1 = after["validation_accuracy"].iloc[0]
            accuracy += (y1 - accuracy) * (units - x0) / (x1 - x0)
        rows.append((*names, accuracy))
    return pd.DataFrame(rows, columns=[*CELL, "seed", "accuracy"])


def first_reach(curve: pd.DataFrame, target: float, column: str) -> float | None:
    """Where a run's accuracy first reaches ``target``, in ``column``; linear between evaluations.

    None if it never does within its budget: a censored observation.
    """
    curve = curve.sort_values("step")
    x, y = curve[column].to_numpy(float), curve["validation_accuracy"].to_numpy(float)
    for index in range(len(y)):
        if y[index] >= target:
            if index == 0:
                return float(x[0])
            share = (target - y[index - 1]) / (y[index] - y[index - 1])
            return float(x[index - 1] + share * (x[index] - x[index - 1]))
    return None
