"""What all figures share: a grid of panels, the methods' looks, ticks and files. Safe for colour-blind
readers.

Colour tells a method's variant (what follows the family in its label), dash and marker its family, so
that fifteen methods stay readable, and a figure reads in grey too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from costbp.config.study import Plan
from costbp.files import atomic

INK, LINE = "#1c2330", "#d3d8e0"  # of text and of grids, which a page replaces by its own
SVG = {"svg.fonttype": "none", "svg.hashsalt": "costbp"}  # text as text, the same names each time
GREY = "0.65"  # lines that nothing is said of: on white and on black
DASHES = {"bp": "", "fmad": (4, 1.5), "zo": (1.2, 1.2)}
MARKERS = {"bp": "o", "fmad": "s", "zo": "^"}
PANEL = (4.3, 3.1)  # inches
LEGEND = 0.27  # inches a row
ABREAST = 3  # panels
EMPTY = "Nothing to show: "
EQUAL = 0.01  # share by which two points of a front must differ
COLORS = dict(zip(MARKERS, sns.color_palette("colorblind", 3), strict=True))
READABLE = (0, 1, 2, 3, 4, 5, 7, 9, 6, 8)  # of seaborn's ten, the pale ones last


@dataclass(frozen=True)
class Look:
    """Colour, dash and marker of every method, by label."""

    colors: dict[str, Any]
    dashes: dict[str, Any]
    markers: dict[str, str]

    @property
    def order(self) -> list[str]:
        """Labels, as configured."""
        return list(self.colors)

    def lines(self, axis: Any, rows: Any, x: str, y: str) -> None:
        """A line per method: the mean over seeds, their range as a band."""
        sns.lineplot(
            rows,
            x=x,
            y=y,
            hue="Method",
            style="Method",
            estimator="mean",
            errorbar=("pi", 100),
            hue_order=self.order,
            style_order=self.order,
            palette=self.colors,
            dashes=self.dashes,
            markers=self.markers,
            markersize=5,
            ax=axis,
        )


def look(plan: Plan, methods: Iterable[str]) -> Look:
    """Looks of methods, by their names in the catalog."""
    families = {
        plan.catalog.methods[name].label: plan.catalog.methods[name].family for name in methods
    }
    variants = list(dict.fromkeys(map(_variant, families)))
    colors = sns.color_palette("colorblind", 10)
    palette = [colors[i] for i in READABLE[: len(variants)]]
    if len(variants) > 10:
        palette = sns.husl_palette(len(variants))
    color_of = dict(zip(variants, palette, strict=True))
    return Look(
        {label: color_of[_variant(label)] for label in families},
        {label: DASHES[family] for label, family in families.items()},
        {label: MARKERS[family] for label, family in families.items()},
    )


def _variant(label: str) -> str:
    """``FmAD-Sparse`` and ``ZO-Sparse`` are one variant; a bare ``BP`` is its family's plain one."""
    return label.split("-", 1)[1] if "-" in label else "Vanilla"


def grid(
    titles: Sequence[str],
    draw: Callable[[Any, int], None],
    *,
    columns: int = ABREAST,
    size: tuple[float, float] = PANEL,
    x: str | None = None,
    y: str | None = None,
    order: Sequence[str] = (),
    abreast: int = 4,
) -> Figure:
    """Panels that ``draw(axis, place)`` fills, with one legend of all their entries below.

    Args:
        columns: panels in a row.
        size: of a panel, inches.
        x, y: names of the axes, written at the edges; None where ``draw`` does it.
        order: of the legend's entries; default: as they are met.
        abreast: entries in a row of the legend.
    """
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    sns.set_theme(
        context="paper",
        style="whitegrid",
        font_scale=1.3,
        rc=ink
        | {
            "grid.color": LINE,
            "axes.edgecolor": LINE,
            "svg.fonttype": "none",
            "svg.hashsalt": "costbp",
            "text.parse_math": False,  # labels are a user's text, dollars and all
        },
    )
    columns = min(columns, len(titles))
    lines = -(-len(titles) // columns)
    width, height = size[0] * columns, size[1] * lines
    figure, axes = plt.subplots(lines, columns, squeeze=False)
    found: dict[str, Any] = {}
    for place, axis in enumerate(axes.flat):
        if place >= len(titles):
            axis.set_axis_off()
            continue
        draw(axis, place)
        axis.set_title(titles[place], fontsize=10)
        if x is not None:
            axis.set_xlabel(x if place + columns >= len(titles) else "")
        if y is not None:
            axis.set_ylabel(y if place % columns == 0 else "")
        handles, names = axis.get_legend_handles_labels()  # not every panel has every entry
        found |= dict(zip(names, handles, strict=True))
        if legend := axis.get_legend():
            legend.remove()
    shown = [name for name in order or found if name in found]
    abreast = min(abreast, max(1, len(shown)))
    below = LEGEND * (1 + -(-len(shown) // abreast)) if shown else 0.0
    figure.set_size_inches(max(width, 2 * PANEL[0]), height + below)
    if shown:
        handles = [found[name] for name in shown]
        figure.legend(handles, shown, loc="lower center", ncol=abreast, frameon=False)
    figure.tight_layout(rect=(0, below / (height + below), 1, 1))
    return figure


def nothing(why: str) -> Figure:
    """A figure of what there is nothing of, which pages leave out."""
    return grid([EMPTY + why], lambda axis, _: axis.set_axis_off())


def wrapped(*lines: str) -> str:
    """Lines of a title or a note, broken where a panel ends."""
    return "\n".join(fill(line, 52) for line in lines)


def by_factors(*axes: Any, of: int = 2) -> None:
    """Logarithmic axes, doubling from tick to tick or growing tenfold, in plain numbers."""
    for axis in axes:
        setter = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
        setter("log", base=of)
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(LogFormatter(of))


def plain(value: float, _: int = 0) -> str:
    """A tick's number without a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def front_of(rows: pd.DataFrame, x: str = "beyond", y: str = "forward_units") -> pd.DataFrame:
    """Rows that no other beats in ``x`` and ``y``, both better when smaller, by ``x``. A ``y`` within
    1 % counts as equal."""
    kept, best = [], float("inf")
    for index, row in rows.sort_values([x, y]).iterrows():
        if row[y] < best * (1 - EQUAL):
            kept.append(index)
            best = row[y]
    return rows.loc[kept]


def save(figure: Figure, path: Path) -> None:
    """``path`` with the suffixes of PNG, PDF and SVG; closes the figure."""
    for kind, date in (("png", None), ("pdf", "CreationDate"), ("svg", "Date")):
        with atomic(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(
                temporary,
                format=kind,
                dpi=150,
                metadata={date: None} if date else None,
                transparent=kind == "svg",
            )
    plt.close(figure)
