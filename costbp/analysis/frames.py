"""Records to tidy frames. Everything after this file works on these frames alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from costbp.config.study import Plan, RunSpec
from costbp.cost.record import CostRecord, read_costs
from costbp.errors import UserError
from costbp.files import intact, sealed
from costbp.train.record import STEPS, Record, read_record

RUNS, CURVES, COSTS = "runs.parquet", "curves.parquet", "costs.parquet"
CELL = ["model", "task", "method", "budget"]
SIZES = ["loss", "derivative_rms", "gradient_norm"]
SPIKE, WINDOW = 10, 100  # times the median of so many steps
COSTED = [name for name in CostRecord.model_fields if name != "seconds_by_card"]
EVALUATED = ["step", "forward_units", "flops", "seconds", "validation_accuracy", "validation_loss"]


@dataclass(frozen=True)
class Missing:
    """What a partial report lacks.

    Attributes:
        runs: one row a run that failed or isn't in the store: cell, seed, reason.
        costs: model/task of costs that were not counted.
        planned: runs of the whole study.
        command: computes what is missing.
    """

    runs: pd.DataFrame
    costs: list[str]
    planned: int
    command: str

    def __str__(self) -> str:
        experiments = len(self.runs[CELL].drop_duplicates())
        costs = f", and the costs of {', '.join(self.costs)}" * bool(self.costs)
        return (
            f"Partial report: {len(self.runs)} of {self.planned} runs are missing, of {experiments} "
            f"experiments{costs}. Mend the cause, then retry: {self.command}"
        )


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
        missing: what they lack of the study, where they are a part of it.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    costs: pd.DataFrame
    missing: Missing | None = None

    def __post_init__(self) -> None:
        if "spent" not in self.runs:  # as older versions aggregated them
            object.__setattr__(self, "runs", self.runs.assign(spent=math.nan))

    @cached_property
    def lacking(self) -> Counter[tuple[str, ...]]:
        """Experiment -> its runs of which there is no row."""
        if self.missing is None:
            return Counter()
        wanted = Counter(self.missing.runs[CELL].itertuples(index=False, name=None))
        failed = self.runs.loc[self.runs["outcome"] == "failed", CELL]
        return wanted - Counter(failed.itertuples(index=False, name=None))


def collect(plan: Plan, retry: str | None = None) -> Frames:
    """Read a study's records and cost files. With ``retry``, the command that computes what is
    missing, what is there is enough.

    Raises:
        UserError: a run or a cost file is missing; with ``retry``, no run is there.
    """
    runs: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    uncounted: list[str] = []
    for cell in plan.cells():
        tuned = plan.choice(cell).tuned
        for spec in plan.specs(cell):
            names = {**cell._asdict(), "seed": spec.seed}
            try:
                run, curve = _read(plan, spec, tuned)
            except UserError as error:
                if retry is None:
                    raise
                missing.append({**names, "reason": str(error)})
                continue
            runs.append(names | run)
            curves.append(curve | names)
            if run["outcome"] == "failed":
                missing.append({**names, "reason": run["message"]})
    for model, task in plan.pairs():
        try:
            found = read_costs(plan.results / "cost" / model / f"{task}.json")
        except UserError:
            if retry is None:
                raise
            uncounted.append(f"{model}/{task}")
        else:
            costs += [cost.model_dump(exclude={"seconds_by_card"}) for cost in found]
    if not runs:
        raise UserError(f"study '{plan.name}': no run has finished yet", 1)
    table = pd.DataFrame(runs)
    counted = _measured(pd.DataFrame(costs, columns=COSTED), table)
    lack = None
    if missing or uncounted:
        lacking = pd.DataFrame(missing, columns=[*CELL, "seed", "reason"])
        lack = Missing(lacking, uncounted, plan.runs, retry or "")
    counts = [len(curve["step"]) for curve in curves]
    columns = {name: np.concatenate([curve[name] for curve in curves]) for name in EVALUATED}
    for name in (*CELL, "seed"):
        columns[name] = np.repeat([curve[name] for curve in curves], counts)
    return Frames(table, pd.DataFrame(columns), counted, lack)


def _read(plan: Plan, spec: RunSpec, tuned: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the frames hold of a run, and its evaluations by column. (Frames are made of thousands of
    runs at once: one for each takes longer than all else.)

    Raises:
        UserError: it isn't in the store, or damaged.
    """
    folder = spec.folder(plan.study.paths.store)
    try:
        record = read_record(folder)
        if record is None:
            raise UserError(f"{folder}: no record; run `snakemake` to compute it", 1)
        table = pq.read_table(folder / STEPS, use_threads=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; run `snakemake` again", 1) from error
    steps = {name: table[name].to_numpy() for name in (*EVALUATED, *SIZES)}
    run = {
        "family": spec.method.family,
        "folder": str(folder),
        "tuned": tuned,
        "hash": record.hash,
        "outcome": record.outcome,
        "message": record.message,
        "optimizer": f"{spec.optimizer.name} {_rate(record):.2g}",
        "finished": record.finished.isoformat(),
        **record.environment,
        **record.summary.figures(),
        "spent": _spent(record),
        **spikes(steps),
    }
    evaluated = ~np.isnan(steps["validation_accuracy"])
    return run, {name: steps[name][evaluated] for name in EVALUATED}


def spikes(steps: Mapping[str, Any]) -> dict[str, float]:
    """A run's steps whose derivatives (with exact gradients: whose norm) are beyond ``SPIKE`` times the
    median of the ``WINDOW`` steps before, and the mean logarithm of what the loss of the ten steps after
    them is over that of the ten before; NaN where there are none."""
    loss, rms, norm = (np.asarray(steps[name], dtype=float) for name in SIZES)
    trained = ~np.isnan(loss)
    loss, rms, norm = loss[trained], rms[trained], norm[trained]
    size = pd.Series(np.abs(norm if np.isnan(rms).all() else rms))
    before = size.rolling(WINDOW, min_periods=10).median().shift(1)
    places = np.flatnonzero((size > SPIKE * before).to_numpy())
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
