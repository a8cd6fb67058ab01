"""Costs at full size: figures, table and a page from traced steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from costbp.analysis.figures import MARKERS, save
from costbp.analysis.report import embedded, render
from costbp.analysis.tables import markdown, si
from costbp.config.study import Plan
from costbp.cost.record import Fit, read_costs, read_records
from costbp.errors import UserError
from costbp.files import write_text

CATEGORIES = (  # bottom to top
    *("weights", "adapters", "gradients", "optimiser state", "saved activations", "tangents"),
    *("directions", "logits and loss", "temporary"),
)
GIB = 2**30
EQUAL = 0.01  # share by which forward units must differ to count


def plain(value: float, _: int = 0) -> str:
    """A tick's number without a power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _frame(folder: Path, names: Iterable[str]) -> pd.DataFrame:
    """Records of several files in one frame, with ``bytes`` and ``beyond`` of each."""
    if folder.name == "fits":
        fits = [fit for name in names for fit in read_records(folder / f"{name}.json", Fit)]
        return pd.DataFrame([fit.model_dump() for fit in fits])
    records: list[pd.DataFrame] = []
    for name in names:
        found = read_costs(folder / f"{name}.json")
        rows = [{**r.model_dump(), "bytes": r.bytes, "beyond": r.beyond} for r in found]
        records.append(pd.DataFrame(rows).assign(sweep=name))
    return pd.concat(records, ignore_index=True)


def _labels(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    methods, models = plan.catalog.methods, plan.catalog.models
    return frame.assign(
        Method=[methods[name].label for name in frame["method"]],
        Model=[models[name].label.split(",")[0] for name in frame["model"]],
        family=[methods[name].family for name in frame["method"]],
    )


def memory(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Bytes at the peak beyond weights, stacked by category: a panel per model, a bar per method."""
    frame = _labels(plan, traces)
    models = list(dict.fromkeys(frame["Model"]))
    figure, axes = plt.subplots(
        -(-len(models) // 3),
        min(3, len(models)),
        figsize=(13, 4.4 * -(-len(models) // 3)),
        squeeze=False,
    )
    colors = dict(zip(CATEGORIES[1:], sns.color_palette("colorblind", 8), strict=True))
    for axis, model in zip(axes.flat, models, strict=False):
        rows = frame[frame["Model"] == model].iloc[::-1]
        left = pd.Series(0.0, index=rows.index)
        for category, color in colors.items():
            size = rows["peak_by_category"].map(lambda parts, c=category: parts.get(c, 0) / GIB)
            axis.barh(rows["Method"], size, left=left, color=color, label=category, height=0.8)
            left += size
        axis.set_title(
            f"{model}\nweights {rows['weights_bytes'].iloc[0] / GIB:.2f} GiB", fontsize=11
        )
        axis.set_xlabel("GiB beyond weights")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", labelsize=8)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07 if len(models) > 3 else 0.17, 1, 1))
    return figure


def flops(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Forward units of an optimiser step: a row per method, a point per model."""
    frame = _labels(plan, traces)
    figure, axis = plt.subplots(figsize=(7.5, 0.33 * frame["Method"].nunique() + 1.6))
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
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(plain))
    axis.set_xlabel("Forward units a step")
    axis.set_ylabel("")
    axis.grid(axis="y", visible=True)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def pareto(plan: Plan, traces: pd.DataFrame) -> Figure:
    """Forward units against bytes beyond weights; the front joins what nothing else beats in both."""
    frame = _labels(plan, traces)
    models = list(dict.fromkeys(frame["Model"]))
    columns = min(3, len(models))
    rows_of = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows_of, columns, figsize=(4.4 * columns, 3.6 * rows_of), squeeze=False
    )
    palette = dict(zip(("bp", "fmad", "zo"), sns.color_palette("colorblind", 3), strict=True))
    for axis, model in zip(axes.flat, models, strict=False):
        rows = frame[frame["Model"] == model]
        for family, part in rows.groupby("family"):
            axis.scatter(
                part["beyond"] / GIB,
                part["forward_units"],
                marker=MARKERS[str(family)],
                color=palette[str(family)],
                label=str(family),
                s=40,
            )
        front = front_of(rows)
        axis.step(
            front["beyond"] / GIB, front["forward_units"], where="post", color="0.4", lw=1, zorder=0
        )
        for _, row in front.iterrows():
            axis.annotate(
                row["Method"],
                (row["beyond"] / GIB, row["forward_units"]),
                fontsize=8,
                xytext=(4, 5),
                textcoords="offset points",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(FuncFormatter(plain))
        axis.margins(0.15)
        axis.set_title(model, fontsize=11)
        axis.set_xlabel("GiB beyond weights")
        axis.set_ylabel("Forward units a step")
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def front_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that no other beats in ``beyond`` (bytes) and ``forward_units``, by bytes. Units within 1 %
    count as equal."""
    kept, best = [], float("inf")
    for index, row in rows.sort_values(["beyond", "forward_units"]).iterrows():
        if row["forward_units"] < best * (1 - EQUAL):
            kept.append(index)
            best = row["forward_units"]
    return rows.loc[kept]


def sweeps(plan: Plan, found: pd.DataFrame) -> Figure:
    """A row per sweep: bytes beyond weights, and forward units, against the key's values."""
    frame = _labels(plan, found)
    assert plan.study.costs is not None
    names = list(dict.fromkeys(frame["sweep"]))
    figure, axes = plt.subplots(len(names), 2, figsize=(10, 3.1 * len(names)), squeeze=False)
    order = list(dict.fromkeys(frame["Method"]))
    colors = dict(zip(order, sns.color_palette("colorblind", len(order)), strict=True))
    for line, name in zip(axes, names, strict=True):
        rows = frame[frame["sweep"] == name].assign(gib=lambda f: f["beyond"] / GIB)
        spec = plan.study.costs.sweeps[name]
        for axis, y, label in (
            (line[0], "gib", "GiB beyond weights"),
            (line[1], "forward_units", "Forward units"),
        ):
            sns.lineplot(
                rows,
                x="value",
                y=y,
                hue="Method",
                style="Method",
                palette=colors,
                markers=True,
                dashes=False,
                ax=axis,
                legend=axis is line[1],
            )
            axis.set_xscale("log", base=2)
            if y == "gib":
                axis.set_yscale("log", base=2)
            else:
                axis.set_ylim(0, None)
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(FuncFormatter(plain))
            axis.set_xlabel(spec.label)
            axis.set_ylabel(label)
        line[0].set_title(f"{rows['Model'].iloc[0]}", fontsize=11)
        line[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    return figure


def fits(plan: Plan, found: pd.DataFrame) -> Figure:
    """The largest batch of each method on each card; in words where none fits."""
    frame = _labels(plan, found)
    models = list(dict.fromkeys(frame["Model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(5.6 * len(models), 4.0), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        rows = frame[frame["Model"] == model]
        wide = rows.pivot_table(index="Method", columns="memory", values="batch", sort=False)
        wide = wide[list(dict.fromkeys(rows["memory"]))]  # as configured
        words = wide.map(lambda n: f"{int(n):,}" if n else "does not fit")
        sns.heatmap(
            wide.map(lambda n: max(n, 1)),
            annot=words,
            fmt="",
            cmap="crest",
            cbar=False,
            ax=axis,
            norm=matplotlib.colors.LogNorm(1, max(2, wide.max().max())),
            annot_kws={"size": 9},
            linewidths=1,
        )
        axis.set_title(f"{model}: largest batch at {rows['seq'].iloc[0]} tokens", fontsize=11)
        axis.set_xlabel("Card")
        axis.set_ylabel("")
    figure.tight_layout()
    return figure


CAPTIONS = {
    "memory": "Bytes at the peak of a step beyond the frozen weights, by what they are for.",
    "flops": "Forward units of an optimiser step: counted FLOPs over those of one no-grad forward.",
    "pareto": "Forward units against bytes beyond weights. The line joins the methods that no other "
    "beats in both. It says nothing of how much a step learns.",
    "sweeps": "One key at a time, all others held.",
    "fits": "The largest batch that each method can train, 0.5 GiB left to the driver.",
}


def table(plan: Plan, traces: pd.DataFrame) -> pd.DataFrame:
    """A row per model and method, in words."""
    frame = _labels(plan, traces)
    return pd.DataFrame(
        {
            "Model": frame["Model"],
            "Method": frame["Method"],
            "Forward units": frame["forward_units"].map("{:.2f}".format),
            "Closed form": frame["closed_form"].map("{:.2f}".format),
            "FLOPs": frame["flops"].map(si),
            "GiB beyond weights": (frame["beyond"] / GIB).map("{:.3f}".format),
            "GiB in all": (frame["bytes"] / GIB).map("{:.2f}".format),
        }
    )


def write(plan: Plan, folder: Path) -> None:
    """``costs.{md,csv}``, figures as PNG and PDF, and the self-contained page ``index.html``."""
    if plan.study.costs is None:
        raise UserError(
            f"study '{plan.name}' has no `costs`; config/studies/full_size.yaml is one that has"
        )
    results = plan.results / "costs"
    traces = _frame(results / "traces", plan.study.costs.models)
    drawn: dict[str, tuple[Callable[..., Figure], pd.DataFrame]] = {
        "memory": (memory, traces),
        "flops": (flops, traces),
        "pareto": (pareto, traces),
    }
    costs = plan.study.costs
    named = {"sweeps": list(costs.sweeps), "fits": costs.fits.models if costs.fits else ()}
    for name, draw in (("sweeps", sweeps), ("fits", fits)):
        if named[name]:
            drawn[name] = draw, _frame(results / name, named[name])
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.15)
    images = {}
    for name, (draw, frame) in drawn.items():
        save(draw(plan, frame), folder / name)
        images[name] = CAPTIONS[name], embedded(folder / f"{name}.png")
    words = table(plan, traces)
    write_text(folder / "costs.md", markdown(words))
    write_text(
        folder / "costs.csv", traces.drop(columns=["sweep"], errors="ignore").to_csv(index=False)
    )
    text = render("costs.html.j2", costs=costs, table=words, figures=images)
    write_text(folder / "index.html", text)
