"""The report's figures: one panel per (model, task, budget), lines or points per method.

The reference and each other family's best method, chosen on the validation split, stand out; all
others are grey. Lines and points carry the address of their runs, which the SVG shows as links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from costbp.analysis.frames import CELL, Frames, labelled
from costbp.analysis.outputs import REPORT
from costbp.analysis.panels import (
    COLORS,
    DASHES,
    GREY,
    MARKERS,
    by_factors,
    front_of,
    grid,
    nothing,
    plain,
    save,
    wrapped,
)
from costbp.analysis.readings.convergence import profiles
from costbp.analysis.statistics import interval
from costbp.analysis.tables import NAMES, SETTING, address, beyond, leaders, mib, run_folder
from costbp.config.study import Plan
from costbp.train.record import STEPS

AXES = {
    "forward_units": "Forward units",
    "seconds": "Training seconds",
    "validation_accuracy": "Validation accuracy, %",
    "validation_loss": "Validation loss",
}
OTHERS = "other methods"
NEAR = 5  # points: rates that score almost as well as the best
POINTS = 200  # of a line that shows every step


def _settings(
    plan: Plan,
    frame: pd.DataFrame,
    fill: Callable[[Any, pd.DataFrame], None],
    *,
    empty: str = "no run got as far as an evaluation",
    order: Sequence[str] = (),
    **options: Any,
) -> Figure:
    """A panel per (model, task, budget), filled from its rows."""
    if frame.empty:
        return nothing(empty)
    catalog, titles, parts = plan.catalog, [], []
    budgets = frame.groupby(["model", "task"])["budget"].nunique()
    for (model, task, budget), part in labelled(plan, frame).groupby(SETTING, sort=False):
        lines = [catalog.tasks[task].label, catalog.models[model].label]
        if budgets[model, task] > 1:
            lines.append(catalog.budgets[budget].label)
        if "leads" in part and len(best := part[part["leads"] & (part["family"] != "bp")]):
            lines.append(f"best: {', '.join(dict.fromkeys(best['Method']))}")
        titles.append(wrapped(*lines))
        parts.append(part)
    order = order or [*_legend(plan).values(), OTHERS]
    return grid(titles, lambda axis, place: fill(axis, parts[place]), order=order, **options)


def _legend(plan: Plan) -> dict[str, str]:
    """Family -> its emphasised line's name in the legend."""
    best = {family: f"best {name} method" for family, name in NAMES.items()}
    return {"bp": f"{plan.catalog.methods[plan.reference].label} (reference)", **best}


def _address(plan: Plan, rows: pd.DataFrame, *words: str) -> str:
    """The folder of an experiment's runs as seen from a figure, and what to say of it."""
    row, paths = rows.iloc[0], plan.study.paths
    folder = address(paths.store.joinpath(*row[CELL]), paths.reports / "figures")
    return f"{folder}#{', '.join([row['Method'], *words])}"


def _style(rows: pd.DataFrame) -> dict[str, Any]:
    family = rows["family"].iloc[0]
    dash = DASHES[family]
    return {"color": COLORS[family], "linestyle": (0, dash) if dash else "-"}


def curve(plan: Plan, frame: pd.DataFrame, x: str, y: str) -> Figure:
    """Validation ``y`` against ``x`` from the start, on an abscissa that is logarithmic from the first
    evaluation after it. A line ends where the first of its seeds does."""
    legend, scale = _legend(plan), 100 if y == "validation_accuracy" else 1

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        if scale == 100:
            axis.axhline(100 * rows["majority"].iloc[0], color="0.5", lw=1, ls=":", zorder=0)
        else:
            _cap(axis, rows, y)
        for _, part in rows.groupby("method", sort=False):
            # seeds stop at slightly different places: the points of an evaluation share one abscissa
            place = part.groupby("seed").cumcount()
            points = part.groupby(place).agg({x: "mean", y: list, "seed": "size"})
            points = points[points["seed"] == part["seed"].nunique()]
            found = [interval(np.multiply(values, scale)) for values in points[y]]
            mean, low, high = np.array(found).reshape(-1, 3).T
            at = points[x].to_numpy()
            if not part["leads"].iloc[0]:
                (line,) = axis.plot(at, mean, color=GREY, lw=0.8, zorder=1, label=OTHERS)
                line.set_url(_address(plan, part))
                continue
            look, family = _style(part), part["family"].iloc[0]
            axis.fill_between(at, low, high, color=look["color"], alpha=0.2, lw=0)
            look |= {"marker": MARKERS[family], "markevery": []}  # the legend's; dots have links
            axis.plot(at, mean, **look, ms=5, label=legend[family])
            dots = axis.scatter(at, mean, s=30, color=look["color"], marker=MARKERS[family], lw=0)
            dots.set_urls(
                [
                    _address(
                        plan, part, f"{AXES[x].lower()} {u:,.0f}", f"{v:.4g} ({a:.4g}-{b:.4g})"
                    )
                    for u, v, a, b in zip(at, mean, low, high, strict=True)
                ]
            )
        _from_zero(axis, rows[x])

    return _settings(plan, frame, fill, x=AXES[x], y=AXES[y])


def _cap(axis: Any, rows: pd.DataFrame, y: str) -> None:
    """End the axis at twice the largest first value, so that one diverging run doesn't press all
    others onto the bottom line; names the methods that go beyond."""
    top = 2 * rows.groupby(["method", "seed"])[y].first().max()
    beyond = list(dict.fromkeys(rows.loc[rows[y] > top, "Method"]))
    if beyond:
        axis.set_ylim(0, top)
        text = wrapped("beyond the axis: " + ", ".join(beyond))
        axis.text(0.03, 0.96, text, transform=axis.transAxes, va="top", fontsize=9)


def _from_zero(axis: Any, values: pd.Series) -> None:
    """A logarithmic abscissa with room for 0 at its left."""
    positive = values[values > 0]
    if positive.empty:
        return
    first, last = positive.min(), positive.max()
    axis.set_xscale("symlog", linthresh=first, linscale=0.4)
    found = LogLocator(subs=(1,) if last / first > 300 else (1, 3)).tick_values(first, last)
    axis.set_xticks([0, *(tick for tick in found if 1.2 * first <= tick <= last)])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelsize=9)
    axis.set_xlim(-first / 8, 1.15 * last)


def memory_accuracy(plan: Plan, frame: pd.DataFrame) -> Figure:
    """Test accuracy against peak memory: beyond weights (filled) and with them (hollow)."""

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        points = []
        for _, part in rows.dropna(subset="test_accuracy").groupby("method", sort=False):
            mean, low, high = interval(100 * part["test_accuracy"])
            sizes = beyond(part), beyond(part) + part["weights_bytes"].max()
            family, color = part["family"].iloc[0], _style(part)["color"]
            axis.plot(sizes, (mean, mean), color=GREY, lw=0.5, zorder=0)
            axis.vlines(sizes[0], low, high, color=color, lw=1)
            look = {"marker": MARKERS[family], "edgecolors": color, "s": 36, "zorder": 3}
            for size, fill_color, words in zip(
                sizes, (color, "none"), ("beyond weights", "with weights"), strict=True
            ):
                dot = axis.scatter(size, mean, facecolors=fill_color, label=family, **look)
                text = f"{mean:.1f} % ({low:.1f}-{high:.1f}), {mib(size)} {words}"
                dot.set_urls([_address(plan, part, text)])
                dot.set_label(f"{ {'bp': 'BP', **NAMES}[family] }, {words}")
            points.append((part["Method"].iloc[0], *sizes, mean))
        table = pd.DataFrame(points, columns=["Method", "beyond", "all", "mean"])
        table["error"], above = 101 - table["mean"], -math.inf
        for x in ("beyond", "all"):
            front = front_of(table, x, "error")
            axis.step(front[x], front["mean"], where="post", color="0.5", lw=1, zorder=0)
            for row in front.itertuples() if x == "beyond" else ():
                if row.mean > above + NEAR:  # names stand one above the other
                    at, above = (row.beyond, row.mean), row.mean
                    axis.annotate(row.Method, at, (4, 5), textcoords="offset points", fontsize=7)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
        axis.xaxis.set_major_formatter(lambda value, _: mib(value).replace(".0", ""))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(0.12)

    frame = frame[frame["peak_bytes"] > 0]  # a run too large for its device has taken no step
    names = {"bp": "BP", **NAMES}.values()
    order = [f"{name}, {words}" for words in ("beyond weights", "with weights") for name in names]
    named = {"x": "Peak memory of a step", "y": "Test accuracy, %"}
    return _settings(plan, frame.drop(columns="leads"), fill, **named, order=order, abreast=3)


def tuning(plan: Plan, trials: pd.DataFrame) -> Figure:
    """Validation accuracy against rate, a row a method: of its first, shortest trial at each rate,
    the best of its steps of differences. A dot marks the rate that was chosen."""

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        rows = rows.sort_values("share").drop_duplicates(["method", "optimizer", "lr", "eps"])
        rows = rows.assign(rate=[f"{o} {lr:.2g}" for o, lr in rows[["optimizer", "lr"]].to_numpy()])
        rows = rows.sort_values(["optimizer", "lr"], ascending=[False, True])
        best = {"index": "Method", "columns": "rate", "values": "accuracy", "aggfunc": "max"}
        wide = 100 * rows.pivot_table(**best, sort=False, dropna=False)
        wide = wide.loc[[m for m in dict.fromkeys(rows.sort_index()["Method"]) if m in wide.index]]
        near = (wide.ge(wide.max(axis=1) - NEAR, axis=0)).sum(axis=1)
        sns.heatmap(wide, cmap="crest", ax=axis, xticklabels=1, yticklabels=1, rasterized=True)
        tried = wide.notna().sum(axis=1)
        axis.set_yticklabels([f"{m} ({near[m]}/{tried[m]})" for m in wide.index])
        for row in rows[rows["chosen"]].drop_duplicates("method").itertuples():
            place = wide.columns.get_loc(row.rate), wide.index.get_loc(row.Method)
            axis.plot(place[0] + 0.5, place[1] + 0.5, "o", color="white", mec="black", ms=5)
        axis.tick_params(labelsize=7)

    return _settings(
        plan,
        trials,
        fill,
        x="",
        y="",
        empty="no trials: this study's rates are the catalog's",
        columns=2,
        size=(6.4, 4.6),
    )


def jumps(plan: Plan, steps: pd.DataFrame) -> Figure:
    """Root mean square of a step's directional derivatives against forward units, every step: one
    seed of the best FmAD and ZO methods."""

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        for _, part in rows.groupby("method", sort=False):
            (line,) = axis.plot(
                part["forward_units"],
                part["derivative_rms"],
                lw=0.8,
                label=_legend(plan)[part["family"].iloc[0]],
                color=_style(part)["color"],
            )
            line.set_url(_address(plan, part, f"seed {part['seed'].iloc[0]}"))
        by_factors(axis.yaxis, of=10)

    named = {"x": AXES["forward_units"], "y": "Directional derivative, rms"}
    return _settings(plan, steps, fill, **named, empty="no method takes directional derivatives")


def profile(plan: Plan, found: pd.DataFrame) -> Figure:
    """Share of the problems in which a method reaches a target at no more than ``factor`` times the
    least units of all methods: a panel a target. The reference, and what solves the most of each
    other family, stand out."""
    if found.empty:
        return nothing("no target could be set")
    methods, legend = plan.catalog.methods, _legend(plan)
    found = found.assign(family=[methods[name].family for name in found["method"]])
    parts = dict(list(found.groupby("target", sort=False)))

    def fill(axis: Any, place: int) -> None:
        rows = list(parts.values())[place]
        most = rows.groupby(["family", "method"], sort=False)["solved"].max()
        most = most.drop("bp", errors="ignore").groupby("family", sort=False).idxmax()
        best = {plan.reference, *(method for _, method in most)}
        for method, part in rows.groupby("method", sort=False):
            look = {"color": GREY, "lw": 0.8, "zorder": 1, "label": OTHERS}
            if method in best:
                look = {**_style(part), "label": legend[part["family"].iloc[0]]}
            solved = 100 * part["solved"].to_numpy()
            axis.step(part["factor"], solved, where="post", **look)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(plain)
        axis.set_ylim(0, 103)

    titles = [f"{target:.0%} of the reference's gain" for target in parts]
    x, y = "Forward units over the least", "Problems, %"
    return grid(titles, fill, x=x, y=y, order=[*legend.values(), OTHERS])


def _trials(plan: Plan) -> pd.DataFrame:
    """The trials by which rates were chosen: a row each, with whether it was chosen."""
    rows = []
    for cell in plan.cells():
        choice = plan.choice(cell).optimizer
        for trial in plan.trials(cell):
            found = {name: getattr(trial, name) for name in ("lr", "eps", "share", "accuracy")}
            chosen = (trial.name, trial.lr) == (choice.name, choice.lr)
            rows.append({**cell._asdict(), **found, "optimizer": trial.name, "chosen": chosen})
    return pd.DataFrame(rows).astype({"accuracy": float} if rows else {})


def _steps(plan: Plan, runs: pd.DataFrame) -> pd.DataFrame:
    """Every step's derivatives of one run of each FmAD or ZO method that leads, thinned to the
    largest of neighbours; from the store."""
    found = []
    for run in runs[runs["leads"] & (runs["family"] != "bp")].drop_duplicates(CELL).itertuples():
        file = run_folder(plan, run) / STEPS
        if not file.exists():
            continue
        steps = pd.read_parquet(file, columns=["forward_units", "derivative_rms"]).dropna()
        places = np.arange(len(steps)) * POINTS // max(len(steps), POINTS)
        steps = steps.loc[steps.groupby(places)["derivative_rms"].idxmax()]
        found.append(
            steps.assign(**{name: getattr(run, name) for name in (*CELL, "seed")}, leads=True)
        )
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """Every figure as PNG, PDF and SVG."""
    best = leaders(plan, frames.runs)
    runs, curves = (
        frame.assign(
            leads=[cell in best for cell in frame[CELL].itertuples(index=False, name=None)]
        )
        for frame in (frames.runs, frames.curves)
    )
    majority = runs.groupby("task")["majority"].first().to_dict()
    found: Mapping[str, pd.DataFrame] = {
        "runs": runs,
        "curves": curves.assign(majority=curves["task"].map(majority)),
        "trials": _trials(plan),
        "steps": _steps(plan, runs),
        "profiles": pd.concat(
            profiles(plan, frames, share=share).assign(target=share) for share in (0.5, 0.75, 0.9)
        ),
    }
    for figure in REPORT:
        save(figure.draw(plan, found[figure.frame]), folder / figure.name)
