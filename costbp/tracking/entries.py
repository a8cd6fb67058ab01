"""What MLflow is told of a run: name, times, tags, parameters, metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

from costbp.config.study import Cell, Plan, RunSpec
from costbp.train.record import CHECKPOINT, RECORD, STEPS, Record

LAYOUT = "2"  # of the names and values below; runs that were logged in another are replaced
POINTS = 200  # logged values a metric; every step is in the artifact steps.parquet


@dataclass(frozen=True)
class Seed:
    """One run: finished, or interrupted where it has no record.

    Attributes:
        folder: where the store keeps it.
    """

    spec: RunSpec
    folder: Path
    record: Record | None

    @property
    def key(self) -> str:
        """What a run is found by, whoever logged it."""
        return f"{'/'.join(self.spec.cell)}/{self.spec.seed}-{self.spec.hash}"

    @property
    def name(self) -> str:
        """Method and seed first: the UI cuts names off."""
        return f"{self.spec.cell[2]} {self.spec.seed} {place(self.spec.cell)}"

    @property
    def end(self) -> int:
        """Milliseconds, as all of MLflow's times."""
        if self.record is None:
            return int(1000 * (self.folder / CHECKPOINT).stat().st_mtime)
        return _milliseconds(self.record.finished)

    @property
    def start(self) -> int:
        if self.record is None:
            return self.end
        summary = self.record.summary
        return self.end - int(1000 * (summary.seconds + summary.evaluation_seconds))

    @property
    def status(self) -> str:
        """MLflow's word; the outcome is a tag."""
        if self.record is None:
            return "KILLED"
        return "FAILED" if self.record.outcome == "failed" else "FINISHED"

    def tags(self, plan: Plan) -> dict[str, str]:
        facts = self.record.environment if self.record else {}
        return {
            "study": plan.name,
            **Cell(*self.spec.cell)._asdict(),
            "method_family": self.spec.method.family,
            "spec_hash": self.spec.hash,
            "outcome": self.record.outcome if self.record else "interrupted",
            **{name: facts.get(name, "unknown") for name in ("commit", "device")},
        }

    def params(self) -> dict[str, Any]:
        spec = self.spec
        kinds = ("model", "task", "method", "budget")
        parts = {name: getattr(spec, name).identity() for name in kinds}
        parts["optimizer"] = spec.optimizer.model_dump(mode="json")
        return {"seed": spec.seed, **dict(_flat("", parts))}

    def metrics(self) -> Iterator[Any]:
        """Curves, and the final figures at step 0, which the UI draws as bars."""
        import pandas as pd  # not in training's start-up
        from mlflow.entities import Metric

        if self.record is None:
            return
        steps, start = pd.read_parquet(self.folder / STEPS), self.start
        for column in (c for c in steps.columns if c not in ("step", "seconds")):
            values = steps[steps[column].notna()]
            stride = 1 if column.startswith("validation_") else max(1, len(values) // POINTS)
            for row in values.iloc[::stride][["step", "seconds", column]].itertuples(index=False):
                yield Metric(column, float(row[2]), start + int(1000 * row[1]), int(row[0]))
        for name, value in _figures(self.record).items():
            yield Metric(f"final.{name}", value, self.end, 0)

    def artifacts(self) -> list[Path]:
        return [path for name in (RECORD, STEPS) if (path := self.folder / name).exists()]


def means(records: Sequence[Record]) -> Iterator[Any]:
    """The mean of each figure over an experiment's seeds."""
    import pandas as pd
    from mlflow.entities import Metric

    figures = pd.DataFrame([_figures(record) for record in records])
    when = max((_milliseconds(record.finished) for record in records), default=0)
    for name in figures:
        yield Metric(f"mean.{name}", mean(figures[name].dropna()), when, 0)


def place(cell: Sequence[str]) -> str:
    """What an experiment compares its method on."""
    model, task, _, budget = cell
    return f"{model}/{task}/{budget}"


def _milliseconds(when: datetime) -> int:
    return int(1000 * when.timestamp())


def _figures(record: Record) -> dict[str, float]:
    found = record.summary.figures().items()
    return {name: float(value) for name, value in found if isinstance(value, int | float)}


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value
