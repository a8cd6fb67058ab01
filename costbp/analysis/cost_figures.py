"""Figures of costs at full size, from traced steps."""

from __future__ import annotations

from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from costbp.analysis.frames import labelled
from costbp.analysis.panels import COLORS, MARKERS, by_factors, front_of, grid, look
from costbp.config.study import Plan

CATEGORIES = (  # of what is beyond weights; bottom to top
    *("adapters", "gradients", "optimiser state", "saved activations", "tangents"),
    *("directions", "logits and loss", "temporary"),
)
GIB = 2**30
BYTES, UNITS = "GiB beyond weights", "Forward units a step"


def _models(plan: Plan, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each model, by its label."""
    return {str(name): f for name, f in labelled(plan, frame).groupby("Model", sort=False)}


def memory(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Bytes at the peak beyond weights, stacked by category: a panel per model, a bar per method."""
    parts = _models(plan, traces)
    colors = dict(zip(CATEGORIES, sns.color_palette("colorblind", 8), strict=True))

    def fill(axis: Any, place: int) -> None:
        rows = list(parts.values())[place].iloc[::-1]
        left = pd.Series(0.0, index=rows.index)
        for category, color in colors.items():
            size = rows["peak_by_category"].map(lambda found, c=category: found.get(c, 0) / GIB)
            axis.barh(rows["Method"], size, left=left, color=color, label=category, height=0.8)
            left += size
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", labelsize=8)

    weights = [rows["weights_bytes"].iloc[0] / GIB for rows in parts.values()]
    titles = [f"{name}\nweights {size:.2f} GiB" for name, size in zip(parts, weights, strict=True)]
    return grid(titles, fill, size=(4.3, 4.4), x=BYTES)


def flops(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Forward units of an optimiser step: a row per method, a point per model."""
    frame = labelled(plan, traces)

    def fill(axis: Any, _: int) -> None:
        sns.stripplot(
            frame,
            y="Method",
            x="forward_units",
            hue="Model",
            palette="colorblind",
            jitter=False,
            ax=axis,
            size=6,
            alpha=0.8,
        )
        by_factors(axis.xaxis)
        axis.grid(axis="y", visible=True)

    size = (8.6, 0.33 * frame["Method"].nunique() + 1.2)
    return grid([""], fill, size=size, x=UNITS, y="", abreast=3)


def pareto(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Forward units against bytes beyond weights; the front joins what nothing else beats in both."""
    parts = _models(plan, traces)

    def fill(axis: Any, place: int) -> None:
        rows = list(parts.values())[place].assign(x=lambda found: found["beyond"] / GIB)
        for family, part in rows.groupby("family"):
            look_of = {"marker": MARKERS[family], "color": COLORS[family]}
            axis.scatter(part["x"], part["forward_units"], label=family, s=40, **look_of)
        front = front_of(rows)
        axis.step(front["x"], front["forward_units"], where="post", color="0.4", lw=1, zorder=0)
        for row in front.itertuples():
            at = (row.x, row.forward_units)
            axis.annotate(row.Method, at, (4, 5), textcoords="offset points", fontsize=8)
        by_factors(axis.xaxis, axis.yaxis)
        axis.margins(0.15)

    return grid(list(parts), fill, size=(4.4, 3.6), x=BYTES, y=UNITS)


def sweeps(plan: Plan, found: pd.DataFrame) -> Figure:
    """A row per sweep: bytes beyond weights, and forward units, against the key's values."""
    assert plan.study.costs is not None
    specs = plan.study.costs.sweeps
    frame = labelled(plan, found.assign(gib=found["beyond"] / GIB))
    looks = look(plan, dict.fromkeys(frame["method"]))
    panels = [(name, y) for name in dict.fromkeys(frame["sweep"]) for y in ("gib", "forward_units")]

    def fill(axis: Any, place: int) -> None:
        name, y = panels[place]
        looks.lines(axis, frame[frame["sweep"] == name], "value", y)
        by_factors(axis.xaxis)
        if y == "gib":
            by_factors(axis.yaxis)
        else:
            axis.set_ylim(0, None)
        axis.set_xlabel(specs[name].label)
        axis.set_ylabel(BYTES if y == "gib" else UNITS)

    models = frame.groupby("sweep")["Model"].first()
    titles = [models[name] if y == "gib" else "" for name, y in panels]
    return grid(titles, fill, columns=2, order=looks.order)


def fits(plan: Plan, found: pd.DataFrame) -> Figure:
    """The largest batch of each method on each card; in words where none fits."""
    parts = _models(plan, found)

    def fill(axis: Any, place: int) -> None:
        rows = list(parts.values())[place]
        wide = rows.pivot_table(index="Method", columns="memory", values="batch", sort=False)
        wide = wide[list(dict.fromkeys(rows["memory"]))]  # as configured
        sns.heatmap(
            wide.map(lambda n: max(n, 1)),
            annot=wide.map(lambda n: f"{int(n):,}" if n else "does not fit"),
            fmt="",
            cmap="crest",
            cbar=False,
            ax=axis,
            norm=matplotlib.colors.LogNorm(1, max(2, wide.max().max())),
            annot_kws={"size": 9},
            linewidths=1,
        )

    titles = [
        f"{name}: largest batch at {rows['seq'].iloc[0]} tokens" for name, rows in parts.items()
    ]
    return grid(titles, fill, columns=len(parts), size=(5.6, 4.0), x="Card", y="")
