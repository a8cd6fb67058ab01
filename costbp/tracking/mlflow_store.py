"""Runs in MLflow, for browsing. The run store stays the truth; this can be rebuilt from it.

Idempotent: a run is found by its key tag before one is created, and metrics carry the run's own
time stamps, so logging twice adds nothing.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from costbp.config.study import Cell, Plan
from costbp.errors import UserError
from costbp.files import ensure_folder, lock
from costbp.train.record import RECORD, STEPS, Record, read_record

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

KEY = "costbp.key"
POINTS = 200  # logged values a metric; every step is in the artifact steps.parquet
CHUNK = 1000  # MLflow's limit of metrics a call


def tracking_uri(plan: Plan) -> str:
    """``MLFLOW_TRACKING_URI`` where set, else the study's local SQLite database."""
    local = f"sqlite:///{(plan.study.paths.mlflow / 'mlflow.db').resolve()}"
    return os.environ.get("MLFLOW_TRACKING_URI") or local


def sync(plan: Plan) -> tuple[int, int]:
    """Bring MLflow up to date with the study's finished runs; returns (added, finished).

    Raises:
        UserError: the tracking server can't be reached or refuses.
    """
    records = []
    for spec in (spec for cell in plan.cells() for spec in plan.specs(cell)):
        with contextlib.suppress(ValueError):  # a damaged record is computed again by the workflow
            records.append(read_record(spec.folder(plan.study.paths.store)))
    found = [record for record in records if record is not None]
    return (log_records(plan, found) if found else 0), len(found)


def database(uri: str) -> Path | None:
    """The file behind a SQLite URI, None for anything else."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def experiment_id(plan: Plan, uri: str) -> str:
    """The MLflow experiment of a study, created with its database at the first call.

    Creation happens under a lock, since several at once fail in the migrations. WAL mode lets the
    UI read, and other jobs write, while one writes.
    """
    from mlflow.tracking import MlflowClient

    root = ensure_folder(plan.study.paths.mlflow)
    with lock(root / ".lock"):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(plan.name)
        if experiment is not None:
            return str(experiment.experiment_id)
        path, artifacts = database(uri), None
        if path is not None:
            with sqlite3.connect(path) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            artifacts = ensure_folder(root / "artifacts" / plan.name).resolve().as_uri()
        return str(client.create_experiment(plan.name, artifact_location=artifacts))


def log_records(plan: Plan, records: Sequence[Record]) -> int:
    """Bring MLflow up to date with ``records``; returns how many runs were added.

    Raises:
        UserError: the tracking server can't be reached or refuses.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(plan)
    try:
        experiment = experiment_id(plan, uri)
        client = MlflowClient(uri)
        return sum(_log(client, experiment, plan, record) for record in records)
    except (MlflowException, OSError, sqlite3.Error) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"MLflow at {uri}: {reason}; `costbp track` repeats the logging") from error


def _log(client: Any, experiment: str, plan: Plan, record: Record) -> bool:
    key = f"{'/'.join(record.spec.cell)}/{record.spec.seed}-{record.hash}"
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    if found and found[0].info.status in ("FINISHED", "FAILED"):
        return False
    when = int(record.finished.timestamp() * 1000)
    start = when - int(1000 * (record.summary.seconds + record.summary.evaluation_seconds))
    if found:
        run_id = found[0].info.run_id
    else:
        name = f"{'/'.join(record.spec.cell)} seed {record.spec.seed}"
        tags = {KEY: key, **_tags(plan, record)}
        run_id = client.create_run(experiment, start, tags, run_name=name).info.run_id
    folder = record.spec.folder(plan.study.paths.store)
    metrics = list(_metrics(record, pd.read_parquet(folder / STEPS), start))
    params = _params(record)
    for first in range(0, max(len(metrics), 1), CHUNK):
        client.log_batch(run_id, metrics[first : first + CHUNK], params if first == 0 else [])
    for name in (RECORD, STEPS):
        client.log_artifact(run_id, str(folder / name))
    client.set_terminated(run_id, "FAILED" if record.outcome == "failed" else "FINISHED", when)
    return True


def _tags(plan: Plan, record: Record) -> dict[str, str]:
    facts = record.environment
    return {
        "study": plan.name,
        **Cell(*record.spec.cell)._asdict(),
        "method_family": record.spec.method.family,
        "spec_hash": record.hash,
        "outcome": record.outcome,
        **{name: facts.get(name, "unknown") for name in ("commit", "device")},
    }


def _params(record: Record) -> list[Any]:
    from mlflow.entities import Param

    spec = record.spec
    parts = {name: getattr(spec, name).identity() for name in ("model", "task", "method", "budget")}
    parts["optimizer"] = spec.optimizer.model_dump(mode="json")
    flat = {"seed": spec.seed, **dict(_flat("", parts))}
    return [Param(name, str(value)[:6000]) for name, value in flat.items()]


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value


def _metrics(record: Record, steps: pd.DataFrame, start: int) -> Iterator[Any]:
    from mlflow.entities import Metric

    columns = [c for c in steps.columns if c not in ("step", "seconds")]
    for column in columns:
        values = steps[steps[column].notna()]
        stride = 1 if column.startswith("validation_") else max(1, len(values) // POINTS)
        for row in values.iloc[::stride][["step", "seconds", column]].itertuples(index=False):
            yield Metric(column, float(row[2]), start + int(1000 * row[1]), int(row[0]))
    when = int(record.finished.timestamp() * 1000)
    for name, value in record.summary.figures().items():
        if isinstance(value, int | float):
            yield Metric(f"final.{name}", float(value), when, record.summary.steps)
