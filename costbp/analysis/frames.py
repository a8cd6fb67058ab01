"""Records to tidy frames. Everything after this file works on these frames alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from costbp.config.study import Plan
from costbp.cost.record import read_costs
from costbp.errors import UserError
from costbp.files import intact, sealed
from costbp.train.record import STEPS, Record, read_record

RUNS, CURVES, COSTS = "runs.parquet", "curves.parquet", "costs.parquet"
CELL = ["model", "task", "method", "budget"]
SPIKE, WINDOW = 10, 100  # times the median of so many steps
EVALUATED = ["step", "forward_units", "flops", "seconds", "validation_accuracy", "validation_loss"]


@dataclass(frozen=True)
class Frames:
    """A study's results.

    Attributes:
        runs: one row a run: cell, seed, family, folder, whether tuned, outcome, optimiser,
            environment, summary figures, spikes, and the share of its budget that it spent, NaN
            unless it completed.
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
                    "folder": str(folder),
                    "tuned": plan.choice(cell).tuned,
                    "hash": record.hash,
                    "outcome": record.outcome,
                    "message": record.message,
                    "optimizer": f"{spec.optimizer.name} {_rate(record):.2g}",
                    "finished": record.finished.isoformat(),
                    **record.environment,
                    **record.summary.figures(),
                    "spent": _spent(record),
                    **spikes(steps := pd.read_parquet(folder / STEPS)),
                }
            )
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


def spikes(steps: pd.DataFrame) -> dict[str, float]:
    """A run's steps whose derivatives (with exact gradients: whose norm) are beyond ``SPIKE`` times the
    median of the ``WINDOW`` steps before, and the mean logarithm of what the loss of the ten steps after
    them is over that of the ten before; NaN where there are none."""
    trained = steps[steps["loss"].notna()]
    name = "derivative_rms" if trained["derivative_rms"].notna().any() else "gradient_norm"
    size = trained[name].abs().reset_index(drop=True)
    before = size.rolling(WINDOW, min_periods=10).median().shift(1)
    places = np.flatnonzero((size > SPIKE * before).to_numpy())
    loss = trained["loss"].to_numpy(float)
    changes = [math.log(loss[i + 1 : i + 11].mean() / loss[i - 10 : i].mean()) for i in places
               if i + 1 < len(loss) and min(loss[i - 10 : i + 11]) > 0]  # fmt: skip
    return {"spikes": len(places), "spike_loss": float(np.mean(changes)) if changes else math.nan}


def _spent(record: Record) -> float:
    budget, summary = record.spec.budget, record.summary
    used = summary.steps if budget.forward_units is None else summary.forward_units
    return used / budget.amount if record.outcome == "completed" else math.nan


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
        with sealed(folder / name) as temporary:
            frame.to_parquet(temporary, index=False)


def load(folder: Path) -> Frames:
    """Frames stored by ``save``.

    Raises:
        UserError: they are not there, or damaged.
    """
    return Frames(*(_stored(folder / name) for name in (RUNS, CURVES, COSTS)))


def _stored(path: Path) -> pd.DataFrame:
    try:
        if intact(path):
            return pd.read_parquet(path)
    except (OSError, ValueError):
        pass
    why = "is damaged" if path.exists() else "is not there"
    raise UserError(f"{path} {why}; run `costbp aggregate`")


def labelled(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    """A frame with its entries' labels as ``Model`` (up to a comma) and ``Method``, and ``family``."""
    methods, models = plan.catalog.methods, plan.catalog.models
    return frame.assign(
        Method=[methods[name].label for name in frame["method"]],
        Model=[models[name].label.split(",")[0] for name in frame["model"]],
        family=[methods[name].family for name in frame["method"]],
    )
