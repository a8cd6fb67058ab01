"""Figures: one panel per (model, task), safe for colour-blind readers.

Colour tells the variant (what follows the family in a label), dash and marker the family, so that
fifteen methods stay readable, and a figure reads in grey too. Lines are means over seeds, bands
their range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from costbp.analysis.captions import CAPTIONS
from costbp.analysis.frames import Frames
from costbp.analysis.tables import mib
from costbp.config.study import Plan
from costbp.files import atomic

DASHES = {"bp": "", "fmad": (4, 1.5), "zo": (1.2, 1.2)}
MARKERS = {"bp": "o", "fmad": "s", "zo": "^"}
PANEL = (4.3, 3.1)  # inches
LEGEND = 0.27  # inches a row
COLUMNS = 4  # of the legend
ABREAST = 3  # panels
READABLE = (0, 1, 2, 3, 4, 5, 7, 9, 6, 8)  # of seaborn's ten, the pale ones last


@dataclass(frozen=True)
class Style:
    """Colour, dash and marker of every method of a study, by label."""

    colors: dict[str, Any]
    dashes: dict[str, Any]
    markers: dict[str, str]
    order: list[str]


def style(plan: Plan) -> Style:
    methods = list(dict.fromkeys(cell.method for cell in plan.cells()))
    entries = [plan.catalog.methods[name] for name in methods]
    variants = list(dict.fromkeys(_variant(entry.label) for entry in entries))
    colors = sns.color_palette("colorblind", 10)
    palette = [colors[i] for i in READABLE[: len(variants)]]
    if len(variants) > 10:
        palette = sns.husl_palette(len(variants))
    color_of = dict(zip(variants, palette, strict=True))
    order = [entry.label for entry in entries]
    return Style(
        {label: color_of[_variant(label)] for label in order},
        {entry.label: DASHES[entry.family] for entry in entries},
        {entry.label: MARKERS[entry.family] for entry in entries},
        order,
    )


def _variant(label: str) -> str:
    """``FmAD-Sparse`` and ``ZO-Sparse`` are one variant; a bare ``BP`` is its family's plain one."""
    return label.split("-", 1)[1] if "-" in label else "Vanilla"


def _labelled(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(
        Method=[plan.catalog.methods[name].label for name in frame["method"]],
        family=[plan.catalog.methods[name].family for name in frame["method"]],
    )


def _grid(
    plan: Plan, frame: pd.DataFrame, draw: Callable[[Any, pd.DataFrame], None], x: str, y: str
) -> Figure:
    """A panel per (model, task); ``draw(axis, rows)`` fills it; one legend below all."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.35)
    if frame.empty:
        figure, axis = plt.subplots(figsize=PANEL)
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no run got as far as an evaluation", ha="center")
        return figure
    pairs = list(dict.fromkeys(zip(frame["model"], frame["task"], strict=True)))
    models, tasks = dict.fromkeys(frame["model"]), dict.fromkeys(frame["task"])
    columns = min(ABREAST, len(pairs))
    if len(pairs) == len(models) * len(tasks) and len(tasks) <= ABREAST:  # a row a model
        pairs, columns = [(model, task) for model in models for task in tasks], len(tasks)
    lines = -(-len(pairs) // columns)
    rows_of_legend = -(-frame["Method"].nunique() // COLUMNS)
    legend_height = LEGEND * (1 + rows_of_legend)
    size = (PANEL[0] * max(2, columns), PANEL[1] * lines + legend_height)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(pairs):
            axis.set_axis_off()
            continue
        model, task = pairs[place]
        draw(axis, frame[(frame["model"] == model) & (frame["task"] == task)])
        title = plan.catalog.tasks[task].label, plan.catalog.models[model].label
        axis.set_title("\n".join(fill(line, 44) for line in title), fontsize=11)
        axis.set_xlabel(x if place + columns >= len(pairs) else "")
        axis.set_ylabel(y if place % columns == 0 else "")
        legend = axis.get_legend()
        if legend is not None:
            legend.remove()
    order = style(plan).order
    found: dict[str, Any] = {}
    for axis in figure.axes:  # not every panel has every method
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    shown = {label: found[label] for label in order if label in found}
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="lower center",
        ncol=min(COLUMNS, len(shown)),
        frameon=False,
    )
    figure.tight_layout(rect=(0, legend_height / size[1], 1, 1))
    return figure


def _cap(axis: Any, rows: pd.DataFrame, y: str) -> None:
    """End the axis at twice the largest first value, so that one diverging run doesn't press all
    others onto the bottom line; names the methods that go beyond."""
    seeds = rows.groupby(["method", "budget", "seed"])
    top = 2 * seeds[y].first().max()
    beyond = list(dict.fromkeys(rows.loc[rows[y] > top, "Method"]))
    if beyond:
        axis.set_ylim(0, top)
        text = "beyond the axis: " + ", ".join(beyond)
        axis.text(*(0.03, 0.96), fill(text, 44), transform=axis.transAxes, va="top", fontsize=9)


def curve(plan: Plan, frames: Frames, x: str, y: str, x_label: str, y_label: str) -> Figure:
    """Validation ``y`` against ``x``, a line per method, on a logarithmic abscissa."""
    look = style(plan)
    majority = frames.runs.groupby("task")["majority"].first()

    def draw(axis: Any, rows: pd.DataFrame) -> None:
        sns.lineplot(
            rows,
            x=x,
            y=y,
            hue="Method",
            style="Method",
            units=None,
            estimator="mean",
            errorbar=("pi", 100),
            hue_order=look.order,
            style_order=look.order,
            palette=look.colors,
            dashes=look.dashes,
            markers=look.markers,
            markersize=5,
            ax=axis,
        )
        if y == "validation_accuracy":
            axis.axhline(majority[rows["task"].iloc[0]], color="0.5", lw=1, ls=":", zorder=0)
            axis.set_ylim(0, 1)
        else:
            _cap(axis, rows, y)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.tick_params(axis="x", labelsize=9)
        axis.xaxis.set_minor_formatter(NullFormatter())

    frame = _labelled(plan, frames.curves)
    frame = frame[frame["step"] > 0]
    # seeds stop at slightly different places: give the points of an evaluation one abscissa
    order = frame.groupby(["model", "task", "method", "budget", "seed"]).cumcount()
    keys = [frame["model"], frame["task"], frame["method"], frame["budget"], order]
    frame = frame.assign(**{x: frame.groupby(keys)[x].transform("mean")})
    return _grid(plan, frame, draw, x_label, y_label)


def memory_accuracy(plan: Plan, frames: Frames) -> Figure:
    """Test accuracy against peak memory beyond weights, a point per method with its seeds' range."""
    look = style(plan)

    def draw(axis: Any, rows: pd.DataFrame) -> None:
        for label in look.order:
            part = rows[rows["Method"] == label]
            if part.empty or part["test_accuracy"].isna().all():
                continue
            accuracy = part["test_accuracy"].dropna()
            mean = accuracy.mean()
            axis.errorbar(
                part["bytes"].iloc[0],
                mean,
                yerr=[[mean - accuracy.min()], [accuracy.max() - mean]],
                fmt=look.markers[label],
                color=look.colors[label],
                markersize=8,
                capsize=3,
                label=label,
            )
        axis.set_ylim(-0.03, 1)
        axis.set_xscale("log")
        least, most = max(1, rows["bytes"].min() / 1.1), max(2, rows["bytes"].max() * 1.1)
        axis.set_xlim(2 ** math.floor(math.log2(least)), 2 ** math.ceil(math.log2(most)))
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axis.xaxis.set_major_formatter(lambda value, _: mib(value).replace(".0", ""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize=9)

    runs = _labelled(plan, frames.runs)
    runs = runs.assign(bytes=runs["peak_bytes"] + runs["state_bytes"])
    runs = runs[runs["peak_bytes"] > 0]  # a run too large for its device has taken no step
    return _grid(plan, runs, draw, "Peak memory beyond weights", "Test accuracy")


FIGURES: dict[str, Callable[[Plan, Frames], Figure]] = {
    f"{name}_{scale}": partial(
        curve, x=column, y=f"validation_{name}", x_label=label, y_label=f"Validation {name}"
    )
    for name in ("accuracy", "loss")
    for scale, column, label in (
        ("units", "forward_units", "Forward units"),
        ("seconds", "seconds", "Training seconds"),
    )
} | {"memory_accuracy": memory_accuracy}


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """Every figure as PNG and PDF."""
    for name in CAPTIONS:
        save(FIGURES[name](plan, frames), folder / name)


def save(figure: Figure, path: Path) -> None:
    """``path`` with the suffixes of PNG and PDF; closes the figure."""
    for kind in ("png", "pdf"):
        with atomic(path.with_suffix(f".{kind}")) as temporary:
            metadata = {"CreationDate": None} if kind == "pdf" else None
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    plt.close(figure)
