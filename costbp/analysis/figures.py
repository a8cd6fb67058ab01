"""The report's figures: one panel per (model, task), lines or points per method."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from costbp.analysis.frames import CELL, Frames, labelled
from costbp.analysis.outputs import REPORT
from costbp.analysis.panels import ABREAST, Look, grid, look, save, wrapped
from costbp.analysis.tables import mib
from costbp.config.study import Plan

AXES = {
    "forward_units": "Forward units",
    "seconds": "Training seconds",
    "validation_accuracy": "Validation accuracy",
    "validation_loss": "Validation loss",
}


def _pairs(
    plan: Plan,
    frame: pd.DataFrame,
    fill: Callable[[Any, pd.DataFrame, Look], None],
    x: str,
    y: str,
) -> Figure:
    """A panel per (model, task), filled from its rows."""
    if frame.empty:
        return grid(["no run got as far as an evaluation"], lambda axis, _: axis.set_axis_off())
    looks = look(plan, dict.fromkeys(cell.method for cell in plan.cells()))
    parts = dict(list(labelled(plan, frame).groupby(["model", "task"], sort=False)))
    models, tasks = (dict.fromkeys(frame[name]) for name in ("model", "task"))
    columns = ABREAST
    if len(parts) == len(models) * len(tasks) and len(tasks) <= ABREAST:  # a row a model
        parts, columns = {(m, t): parts[m, t] for m in models for t in tasks}, len(tasks)
    titles = [
        wrapped(plan.catalog.tasks[task].label, plan.catalog.models[model].label)
        for model, task in parts
    ]
    rows = list(parts.values())
    return grid(
        titles,
        lambda axis, place: fill(axis, rows[place], looks),
        columns=columns,
        x=x,
        y=y,
        order=looks.order,
    )


def curve(plan: Plan, frame: pd.DataFrame, x: str, y: str) -> Figure:
    """Validation ``y`` against ``x``, a line per method, on a logarithmic abscissa."""

    def fill(axis: Any, rows: pd.DataFrame, looks: Look) -> None:
        looks.lines(axis, rows, x, y)
        if y == "validation_accuracy":
            axis.axhline(rows["majority"].iloc[0], color="0.5", lw=1, ls=":", zorder=0)
            axis.set_ylim(0, 1)
        else:
            _cap(axis, rows, y)
        _logarithmic(axis, 10, lambda value, _: f"{value:,g}", subs=(1, 2, 5), numticks=8)

    frame = frame[frame["step"] > 0]
    # seeds stop at slightly different places: give the points of an evaluation one abscissa
    place = frame.groupby([*CELL, "seed"]).cumcount()
    keys = [*(frame[name] for name in CELL), place]
    frame = frame.assign(**{x: frame.groupby(keys)[x].transform("mean")})
    return _pairs(plan, frame, fill, AXES[x], AXES[y])


def _cap(axis: Any, rows: pd.DataFrame, y: str) -> None:
    """End the axis at twice the largest first value, so that one diverging run doesn't press all
    others onto the bottom line; names the methods that go beyond."""
    top = 2 * rows.groupby(["method", "budget", "seed"])[y].first().max()
    beyond = list(dict.fromkeys(rows.loc[rows[y] > top, "Method"]))
    if beyond:
        axis.set_ylim(0, top)
        text = wrapped("beyond the axis: " + ", ".join(beyond))
        axis.text(0.03, 0.96, text, transform=axis.transAxes, va="top", fontsize=9)


def _logarithmic(axis: Any, base: int, words: Callable[..., str], **ticks: Any) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(base=base, **ticks))
    axis.xaxis.set_major_formatter(words)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=9)


def memory_accuracy(plan: Plan, frame: pd.DataFrame) -> Figure:
    """Test accuracy against peak memory beyond weights, a point per method with its seeds' range."""

    def fill(axis: Any, rows: pd.DataFrame, looks: Look) -> None:
        for label, part in rows.dropna(subset="test_accuracy").groupby("Method", sort=False):
            accuracy = part["test_accuracy"]
            mean = accuracy.mean()
            axis.errorbar(
                part["bytes"].iloc[0],
                mean,
                yerr=[[mean - accuracy.min()], [accuracy.max() - mean]],
                fmt=looks.markers[label],
                color=looks.colors[label],
                markersize=8,
                capsize=3,
                label=label,
            )
        axis.set_ylim(-0.03, 1)
        _logarithmic(axis, 2, lambda value, _: mib(value).replace(".0", ""), numticks=6)
        least, most = max(1, rows["bytes"].min() / 1.1), max(2, rows["bytes"].max() * 1.1)
        axis.set_xlim(2 ** math.floor(math.log2(least)), 2 ** math.ceil(math.log2(most)))

    frame = frame.assign(bytes=frame["peak_bytes"] + frame["state_bytes"])
    frame = frame[frame["peak_bytes"] > 0]  # a run too large for its device has taken no step
    return _pairs(plan, frame, fill, "Peak memory beyond weights", "Test accuracy")


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """Every figure as PNG and PDF."""
    majority = frames.runs.groupby("task")["majority"].first().to_dict()
    found = {
        "runs": frames.runs,
        "curves": frames.curves.assign(majority=frames.curves["task"].map(majority)),
    }
    for figure in REPORT:
        save(figure.draw(plan, found[figure.frame]), folder / figure.name)
