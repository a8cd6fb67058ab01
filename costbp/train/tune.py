"""Learning rates: the same number of trials for every method, on the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from costbp.config.study import Cell, Plan
from costbp.errors import UserError
from costbp.files import write_text
from costbp.train.experiment import run_specs
from costbp.train.record import Record, read_record


def run_trials(plan: Plan, cell: Cell) -> list[Record]:
    """Run an experiment's trials through the store; the test split is never scored."""
    return run_specs(plan, plan.trial_specs(cell), test=False)


def score(record: Record) -> tuple[float, float]:
    """Sort key of a trial, larger is better: validation accuracy, then lower validation loss.
    A diverged trial loses to every other."""
    summary = record.summary
    if record.outcome != "completed" or summary.validation_accuracy is None:
        return (-1.0, 0.0)
    loss = summary.validation_loss
    return (summary.validation_accuracy, -(loss if loss is not None else float("inf")))


def choose(records: Sequence[Record]) -> Record:
    """The best trial; the first of equals."""
    return max(records, key=score)


def write_choices(plan: Plan, path: Path) -> None:
    """Write every experiment's choice, with what each trial scored as a comment of the choice.

    Raises:
        UserError: a trial has not been run.
    """
    choices: dict[str, Any] = {}
    evidence: list[str] = []
    for cell in plan.cells():
        records = []
        for spec in plan.trial_specs(cell):
            record = read_record(spec.folder(plan.study.paths.store))
            if record is None:
                raise UserError(f"{cell}: a tuning trial is missing; run `snakemake tune`")
            records.append(record)
        best = choose(records).spec.optimizer
        kept = best.model_dump(mode="json", exclude_defaults=True)
        kept = {"name": best.name, **kept}
        choices.setdefault(cell.model, {}).setdefault(cell.task, {})[cell.method] = kept
        scores = ", ".join(
            f"{r.spec.optimizer.name} {r.spec.optimizer.lr:g}: "
            + ("diverged" if score(r)[0] < 0 else f"{score(r)[0]:.3f}")
            for r in records
        )
        evidence.append(f"#   {cell}: {scores}")
    tuning = plan.study.tuning
    about = (
        f"Written by `snakemake tune` for study '{plan.name}'; seed {tuning.seed}, "
        f"{tuning.fraction:g} of each budget, validation accuracy decides."
    )
    text = yaml.safe_dump({"about": about, "choices": choices}, sort_keys=False, width=100)
    write_text(
        path, text + "\n# Validation accuracy of every trial:\n" + "\n".join(evidence) + "\n"
    )
