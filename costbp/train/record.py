"""A run's record: what happened, under which spec, where and with which code.

The run store holds one folder a seed: ``record.json``, ``steps.parquet`` and, while a run is
unfinished, ``checkpoint.pt`` and ``progress.json``. Files appear by atomic rename; ``record.json``,
whose seal covers both files, comes last: a folder with a sound record is a finished run.
"""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from costbp.config.study import RunSpec
from costbp.files import atomic, intact, seal_of, sealed

Row = Mapping[str, float | int | None]  # one step or evaluation: column -> value
Outcome = Literal["completed", "diverged", "out_of_memory", "does_not_fit", "failed"]
UNFIT = ("does_not_fit", "out_of_memory")  # outcomes of runs too large for their device
RECORD, STEPS, CHECKPOINT, PROGRESS = (
    "record.json",
    "steps.parquet",
    "checkpoint.pt",
    "progress.json",
)
ENOUGH = 0.95  # share of its budget from which a run counts as having spent it
NOISE = 1.0  # signal to noise at which a difference tells nothing
WHOLE = ("step", "flops")
COLUMNS = pa.schema(
    [
        (name, pa.int64() if name in WHOLE else pa.float64())
        for name in (
            *("step", "forward_units", "flops", "seconds", "loss", "gradient_norm"),
            *("derivative_rms", "validation_accuracy", "validation_loss"),
        )
    ]
)  # of steps.parquet


class Summary(BaseModel):
    """Figures of a finished run. Losses and accuracies that are not finite are None.

    Attributes:
        test_accuracy, test_loss: on the test split, with the parameters of the best evaluation, or
            the last, as the study says.
        scored_step: the step that those parameters are of.
        test_metrics: all that the task's benchmark reports of the test split.
        validation_accuracy, validation_loss: at the last evaluation.
        best_validation_accuracy: the highest of all evaluations.
        steps: optimiser steps taken.
        forward_units, flops: spent on training, evaluation not included.
        seconds: wall time of training steps; evaluation and counting not included.
        evaluation_seconds: wall time of evaluations.
        counting_seconds: wall time of counting what steps of a new kind cost.
        peak_bytes: largest step peak beyond parameters, gradient and optimiser state.
        state_bytes: trainable vector, its gradient, optimiser state.
        weights_bytes: frozen parameters and buffers.
        rss_bytes: largest resident size of the process so far.
        d: trainable parameters.
        majority: share of the most frequent class of the test split.
        resumed: how often the run was taken up again.
        non_finite: directional derivatives that were dropped.
        learning_rate: as it was used, d taken into account.
        eps, float32: step and precision of the method's differences, as settled at the start.
        difference_snr, difference_cosine: of those differences against exact derivatives at the
            start (``estimators/probe.py``): signal to noise in power, and cosine.
        probe_forwards: forward passes that settling them took; not charged to the budget.
        step_seconds, forward_seconds: a typical optimiser step (each kind's median after the first
            steps) and a no-grad forward, the device synchronised.
        predicted_bytes: all bytes at a step's peak, traced without the device.
        ceiling_bytes: what the budget allows them to be; None without a ceiling.
        arrangement: how the method kept under it.
        allocated_bytes, reserved_bytes: the same as the device's allocator tells, largest step.
    """

    model_config = ConfigDict(extra="forbid")

    test_accuracy: float | None = None
    test_loss: float | None = None
    test_metrics: dict[str, float] = {}
    scored_step: int | None = None
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    best_validation_accuracy: float | None = None
    steps: int = 0
    forward_units: float = 0.0
    flops: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    counting_seconds: float = 0.0
    peak_bytes: int = 0
    state_bytes: int = 0
    weights_bytes: int = 0
    rss_bytes: int = 0
    d: int = 0
    majority: float = 0.0
    resumed: int = 0
    non_finite: int = 0
    learning_rate: float | None = None
    eps: float | None = None
    float32: bool = False
    difference_snr: float | None = None
    difference_cosine: float | None = None
    probe_forwards: int = 0
    step_seconds: float | None = None
    forward_seconds: float | None = None
    predicted_bytes: int | None = None
    ceiling_bytes: int | None = None
    arrangement: str = ""
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None

    def figures(self) -> dict[str, float | int | str | None]:
        """All of it by name; the test split's metrics are called ``test_`` and their name."""
        metrics = {f"test_{name}": value for name, value in self.test_metrics.items()}
        return metrics | self.model_dump(exclude={"test_metrics"})


class Record(BaseModel):
    """What ``record.json`` holds."""

    model_config = ConfigDict(extra="forbid")

    hash: str
    spec: RunSpec
    outcome: Outcome
    message: str = ""
    summary: Summary
    environment: dict[str, str]
    finished: datetime


def read_record(folder: Path) -> Record | None:
    """The record of a finished run, or None where there is none.

    Raises:
        ValueError: a record is there but can't be read, or belongs to another spec.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        if not intact(path):
            raise ValueError
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
        if record.outcome != "failed" and not seal_of(path).exists():
            pq.read_table(folder / STEPS, columns=["step"], use_threads=False)
    except (ValidationError, OSError, ValueError) as error:
        raise ValueError(f"{path} is incomplete or damaged") from error
    if not folder.name.endswith(record.hash):
        raise ValueError(f"{path} belongs to another run")
    return record


def write_run(folder: Path, record: Record, rows: Sequence[Row]) -> None:
    """Store a finished run: steps first, the record last. A row that lacks a column has a null
    there; a run that ended before its first step has no rows. (Without pandas, whose import would
    cost every job most of a second.)"""
    with atomic(folder / STEPS) as temporary:
        columns = {name: [row.get(name) for row in rows] for name in COLUMNS.names}
        pq.write_table(pa.table(columns, schema=COLUMNS), temporary)
    with sealed(folder / RECORD, folder / STEPS) as temporary:
        temporary.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for name in (CHECKPOINT, PROGRESS):
        (folder / name).unlink(missing_ok=True)


@functools.cache
def environment(device: str) -> dict[str, str]:
    """Where a run ran: versions, machine, device, commit of the code (with `+` if changed)."""
    found = {"python": platform.python_version(), "device": device, "machine": platform.machine()}
    for package in ("costbp", "torch", "transformers", "peft", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"commit": commit()}


def commit() -> str:
    """The working tree's commit, `+` appended if tracked files differ from it; or "unknown"."""

    def git(*words: str) -> Any:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if changed else "")
