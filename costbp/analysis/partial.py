"""The report of a part of a study: what the store holds, and what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

from costbp.analysis import claims, figures, report, tables
from costbp.analysis.frames import collect
from costbp.config.study import Plan

FOLDER = "partial"  # of paths.reports: apart from what the whole study's rules write


def write(plan: Plan, retry: str) -> str:
    """Tables, figures, claims and page of the runs that are in the store, in a folder of their own;
    returns what to say of it. Where nothing is missing there is nothing to write.

    Args:
        retry: the command that computes what is missing.

    Raises:
        UserError: no run has finished.
    """
    folder = plan.study.paths.reports / FOLDER
    frames = collect(plan, retry)
    shutil.rmtree(folder, ignore_errors=True)
    if frames.missing is None:
        return f"study '{plan.name}': no run is missing"
    paths = plan.study.paths.model_copy(update={"reports": folder})
    plan = plan.model_copy(update={"study": plan.study.model_copy(update={"paths": paths})})
    tables.write(plan, frames, folder / "tables")
    figures.write(plan, frames, folder / "figures")
    claims.write(plan, frames, folder)
    report.write(plan, frames, folder)
    return f"{folder / 'index.html'}: {frames.missing}"


def clear(reports: Path) -> None:
    """Remove what a partial report has left, once there is a whole one."""
    shutil.rmtree(reports / FOLDER, ignore_errors=True)
