"""The page of insight: figures, sentences and a table from points alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from costbp.analysis.panels import by_factors, grid, save, wrapped
from costbp.analysis.report import embedded, render
from costbp.analysis.tables import markdown
from costbp.config.insight import Quadratic
from costbp.config.study import Plan
from costbp.cost.record import read_records
from costbp.files import write_text
from costbp.insight.points import Point, path_of, settings

CLOSE = 1.1  # factor within which a measured value agrees with its prediction
BESIDE = 1.05  # factor between neighbours' places on an axis, so that they don't hide each other
NOTHING = 1e-9  # an error that is predicted to be none
MARKS = {"exact": "o", "central": "x"}
CAPTIONS = {
    "cosine": "Cosine of estimates along Gaussian directions to the gradient, against their number K "
    "and against d. Circles: exact derivatives; crosses: central differences. Lines: sqrt(K / (K + d "
    "+ 1)), and sqrt(2 / (pi d)) for K = 1.",
    "error": "Squared error of estimates over the gradient's square, by kind of direction. Circles: "
    "exact derivatives; crosses: central differences. Lines: closed forms. Frames of K = d directions "
    "have no error, and no point.",
    "rate": "Largest stable learning rate of plain descent on one batch, as a share of 2 / |H|. "
    "Dashed: 1 / (1 + (d + 1) / K). Solid: the same with the effective rank tr H+ / |H+| for d. "
    "Dotted: BP's own rate, measured.",
    "slow_down": "Steps to a loss that BP reaches in so many, over BP's, each at a quarter of its largest "
    "stable rate. Dashed: 1 + (d + 1) / K. Solid: the same with the effective rank for d. Triangles: "
    "not every repeat arrived, so a bound from below.",
}


def read(plan: Plan) -> pd.DataFrame:
    """All points of the study, a row each, with the problem's ``title``.

    Raises:
        UserError: the study has no `insight`, or a problem isn't measured yet.
    """
    problems = settings(plan).problems
    found = [point for name in problems for point in read_records(path_of(plan, name), Point)]
    frame = pd.DataFrame([point.model_dump() for point in found])
    columns = ["measured", "low", "high", "predicted", "by_rank"]
    frame[columns] = frame[columns].astype(float)
    return frame.assign(title=frame["problem"].map({name: title(plan, name) for name in problems}))


def title(plan: Plan, name: str) -> str:
    """A problem in words."""
    spec = settings(plan).problems[name]
    if isinstance(spec, Quadratic):
        return spec.title
    catalog = plan.catalog
    return f"{catalog.models[spec.model].label}; {catalog.tasks[spec.task].label}"


# --- figures ---------------------------------------------------------------------------------------


def _mark(axis: Any, rows: pd.DataFrame, marker: str, x: str = "count", **look: Any) -> None:
    """Points with their intervals; triangles where only a bound is known."""
    known = rows["high"].notna()
    whole, bounds = rows[known], rows[~known]
    ends = [whole["measured"] - whole["low"], whole["high"] - whole["measured"]]
    style = {"ms": 5, "lw": 1, "capsize": 2} | look
    axis.errorbar(whole[x], whole["measured"], yerr=ends, fmt=marker, **style)
    axis.plot(bounds[x], bounds["measured"], "^", ms=6, color=look["color"])


def _estimates(axis: Any, rows: pd.DataFrame, x: str, by: str, colors: Mapping[Any, Any]) -> None:
    """A colour a group: its points, and a line through what is predicted for them."""
    for name, part in rows.groupby(by, sort=by == "count"):
        color, label = colors[name], f"K = {name}" if by == "count" else str(name)
        place = list(colors).index(name) - len(colors) / 2 if by == "series" else 0
        part = part.assign(**{x: part[x] * BESIDE**place})
        for oracle, found in part.groupby("oracle"):
            shown = label if oracle == "exact" else None
            _mark(axis, found, MARKS[oracle], x, color=color, label=shown)
        line = part.sort_values(x)
        axis.plot(line[x], line["predicted"], color=color, lw=1)
    if x == "count":
        by_factors(axis.xaxis)
    else:
        by_factors(axis.xaxis, of=10)
    by_factors(axis.yaxis, of=10)


def cosine(points: pd.DataFrame) -> Figure:
    """Against K, a colour a problem; against d, a colour a K."""
    panels = (("count", "title", "Directions K"), ("d", "count", "Trained parameters d"))

    def fill(axis: Any, place: int) -> None:
        x, by, name = panels[place]
        groups = sorted(points[by].unique())
        colors = dict(zip(groups, sns.color_palette("viridis", len(groups)), strict=True))
        _estimates(axis, points, x, by, colors)
        axis.set_xlabel(name)

    titles = ["against the directions", "against the parameters"]
    return grid(titles, fill, y="Cosine to the gradient", size=(5.6, 4.2), abreast=2)


def error(points: pd.DataFrame) -> Figure:
    """A panel per problem, a colour a kind."""
    kinds = points["series"].unique()
    colors = dict(zip(kinds, sns.color_palette("husl", len(kinds)), strict=True))
    shown = points[points["predicted"] > NOTHING]

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        _estimates(axis, rows, "count", "series", colors)

    return _panels(shown, fill, "Squared error / |g|^2")


def against_theory(points: pd.DataFrame, y: str) -> Figure:
    """A panel per problem; predictions by d and by the effective rank."""
    colors = sns.color_palette("colorblind", 4)

    def fill(axis: Any, rows: pd.DataFrame) -> None:
        own = rows[rows["count"] > 0]
        for column, dash, label in (("predicted", "--", "by d"), ("by_rank", "-", "by rank")):
            axis.plot(own["count"], own[column], dash, color="0.4", label=f"predicted {label}")
        for color, (series, part) in zip(colors, own.groupby("series", sort=False), strict=False):
            _mark(axis, part, "o", color=color, label=f"measured, {series}")
        for value in rows.loc[rows["count"] == 0, "measured"]:
            axis.axhline(value, ls=":", color=colors[3], label="measured, BP")
        by_factors(axis.xaxis)
        by_factors(axis.yaxis, of=10)

    return _panels(points, fill, y)


def _panels(points: pd.DataFrame, fill: Callable[[Any, pd.DataFrame], None], y: str) -> Figure:
    parts = {str(name): rows for name, rows in points.groupby("title", sort=False)}
    titles = [wrapped(f"{name}", f"d = {rows['d'].iloc[0]:,}") for name, rows in parts.items()]
    rows_of, size = list(parts.values()), (4.3, 3.6)
    return grid(titles, lambda axis, n: fill(axis, rows_of[n]), x="Directions K", y=y, size=size)


FIGURES: Mapping[str, Callable[[pd.DataFrame], Figure]] = {
    "cosine": cosine,
    "error": error,
    "rate": lambda points: against_theory(points, "Largest stable rate x |H| / 2"),
    "slow_down": lambda points: against_theory(points, "Steps over BP's"),
}

# --- words -----------------------------------------------------------------------------------------


def sentences(points: pd.DataFrame, question: str) -> list[str]:
    """What the points of a question say of its predictions, a sentence a problem."""
    rows = points[(points["question"] == question) & (points["count"] > 0)]
    return [_said(str(name), part, question) for name, part in rows.groupby("title", sort=False)]


def _said(name: str, rows: pd.DataFrame, question: str) -> str:
    known = rows[rows["predicted"] > NOTHING]
    whole = known[known["given_up"] == 0]
    bounds = len(known) - len(whole)
    rest = f" {bounds} of {len(known)} points are bounds and left out." if bounds else ""
    if whole.empty:
        return f"{name}: no repeat arrived, so nothing is compared."
    if question in ("cosine", "error"):
        return f"{name}: {agreement(whole, 'predicted')}"
    if np.allclose(whole["by_rank"], whole["predicted"], rtol=0.01):
        return f"{name}: d and effective rank are alike; {agreement(whole, 'by_rank')}{rest}"
    nearer = _away(whole, "by_rank") < _away(whole, "predicted")
    return (
        f"{name}: by d, {agreement(whole, 'predicted')} By effective rank, "
        f"{agreement(whole, 'by_rank')} The rank predicts nearer in {nearer.sum()} of "
        f"{len(whole)} points.{rest}"
    )


def _away(rows: pd.DataFrame, column: str) -> pd.Series:
    return np.log(rows["measured"] / rows[column]).abs()


def agreement(rows: pd.DataFrame, column: str) -> str:
    """``measured / predicted is 0.98 to 1.03 ...``: its range, and how many points are off: beyond 10 %
    with an interval that leaves the prediction out."""
    ratio = rows["measured"] / rows[column]
    outside = (rows[column] < rows["low"]) | (rows[column] > rows["high"])
    off = int((outside & (_away(rows, column) > np.log(CLOSE))).sum())
    word = f"off in {off} of {len(rows)}" if off else f"none of {len(rows)} is off"
    return f"measured / predicted is {ratio.min():.3g} to {ratio.max():.3g}; {word}."


def curvature_table(points: pd.DataFrame) -> pd.DataFrame:
    """A row per problem: d, the spectrum's figures with intervals, BP's stable rate."""
    rows = points[points["question"] == "curvature"].assign(
        text=lambda found: [_value(row) for row in found.itertuples()]
    )
    wide = rows.pivot_table(
        index=["title", "d"], columns="series", values="text", aggfunc="first", sort=False
    ).reset_index()
    bp = points[(points["question"] == "rate") & (points["count"] == 0)].set_index("title")
    wide["BP's stable rate x largest curvature / 2"] = wide["title"].map(
        bp["measured"].map("{:.2f}".format)
    )
    return wide.rename(columns={"title": "Problem"})


def _value(row: Any) -> str:
    one = f"{row.measured:.3g}"
    return one if row.low == row.high else f"{one} ({row.low:.3g}-{row.high:.3g})"


def repeats(points: pd.DataFrame) -> str:
    """How many repeats are behind the points: ``5 to 128 repeats a point``."""
    own = points.loc[points["count"] > 0, "repeats"]
    low, high = own.min(), own.max()
    return f"{low} repeats a point" if low == high else f"{low} to {high} repeats a point"


def write(plan: Plan, folder: Path) -> None:
    """``points.csv``, figures as PNG, PDF and SVG, and the self-contained page ``index.html``."""
    points = read(plan)
    write_text(folder / "points.csv", points.to_csv(index=False))
    parts: list[dict[str, Any]] = []
    for name, draw in FIGURES.items():
        rows = points[points["question"] == name]
        if rows.empty:
            continue
        save(draw(rows), folder / name)
        note = f"{repeats(rows)}; bars are 95 % intervals of the mean (Student's t)."
        picture = (f"{CAPTIONS[name]} {note}", embedded(folder / f"{name}.svg"))
        parts.append({"figures": {name: picture}, "said": sentences(points, name)})
    table = curvature_table(points) if (points["question"] == "curvature").any() else None
    if table is not None:
        write_text(folder / "curvature.md", markdown(table))
    text = render("insight.html.j2", parts=parts, table=table, insight=plan.study.insight)
    write_text(folder / "index.html", text)
