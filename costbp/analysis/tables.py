"""Tables of results and costs, in Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from costbp.analysis.frames import CELL, Frames
from costbp.analysis.statistics import interval
from costbp.config.study import Plan
from costbp.files import write_text
from costbp.train.record import ENOUGH

SETTING = ["model", "task", "budget"]  # within which methods are compared
NAMES = {"fmad": "FmAD", "zo": "ZO"}
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "%&_#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float) -> str:
    """``3.21 T`` for 3.21e12."""
    for factor, prefix in PREFIXES:
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def mib(value: float) -> str:
    """Bytes as MiB or KiB."""
    return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"


def spread(values: pd.Series, scale: float = 1.0, digits: int = 1) -> str:
    """Mean with its 95 % interval over seeds; a dash where there is nothing. A share (a ``scale`` of
    100) ends at 0 and 100."""
    mean, low, high = interval(values * scale)
    if math.isnan(mean):
        return "-"
    if values.count() == 1:
        return f"{mean:.{digits}f}"
    low, high = max(0.0, low), min(high, 100 if scale == 100 else math.inf)
    return f"{mean:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def leaders(plan: Plan, runs: pd.DataFrame) -> set[tuple[str, ...]]:
    """Cells of the reference, and of every other family's best method on each (model, task, budget):
    that of the highest mean over seeds of the best validation accuracy. A choice, so never by the
    test split."""
    found: set[tuple[str, ...]] = {c for c in plan.cells() if c.method == plan.reference}
    scores = runs[runs["family"] != "bp"].groupby([*CELL, "family"], sort=False)
    best = scores["best_validation_accuracy"].mean().dropna().reset_index()
    if len(best):
        groups = best.groupby([*SETTING, "family"])["best_validation_accuracy"]
        found |= set(best.loc[groups.idxmax(), CELL].itertuples(index=False, name=None))
    return found


def address(folder: str | os.PathLike[str], start: Path) -> str:
    """A folder as a link from a file in ``start``."""
    return quote(Path(os.path.relpath(folder, start)).as_posix(), safe="/=")


def run_folder(plan: Plan, run: Any) -> Path:
    """A run's folder in the store."""
    cell = [getattr(run, name) for name in CELL]
    return plan.study.paths.store.joinpath(*cell, f"seed={run.seed}-{run.hash}")


def numbers(frames: Frames) -> pd.DataFrame:
    """One row an experiment with plain numbers: what the CSV holds."""
    grouped = frames.runs.groupby(CELL, sort=False)
    table = grouped.agg(
        seeds=("seed", "count"),
        d=("d", "max"),
        majority=("majority", "max"),
        **{f"test_accuracy_{how}": ("test_accuracy", how) for how in ("mean", "min", "max")},
        **{f"{name}_mean": (name, "mean") for name in ("test_loss", "best_validation_accuracy")},
        **{name: (name, "mean") for name in ("steps", "forward_units", "flops")},
        spent=("spent", "min"),
        seconds_mean=("seconds", "mean"),
        **{name: (name, "max") for name in ("peak_bytes", "state_bytes", "weights_bytes")},
        optimizer=("optimizer", "first"),
        outcome=("outcome", outcomes),
        commit=("commit", "first"),
        **{f"{name}_mean": (name, "mean") for name in further(frames.runs)},
    )
    lacking = frames.lacking
    if absent := [cell for cell in lacking if cell not in table.index]:
        index = pd.MultiIndex.from_tuples([*table.index, *absent], names=CELL)
        table = table.reindex(index).fillna({"seeds": 0, "outcome": ""}).astype({"seeds": int})
    found = [with_missing(text, lacking[cell]) for cell, text in table["outcome"].items()]
    return table.assign(outcome=found).reset_index()


def outcomes(found: pd.Series) -> str:
    """Of an experiment's runs, with their numbers where they differ."""
    counts = found.value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def with_missing(outcome: str, count: int) -> str:
    """An experiment's outcome, with its runs that are missing."""
    return ", ".join([outcome] * bool(outcome) + [f"{count} missing"] * bool(count))


def _named(plan: Plan, model: str, task: str, method: str) -> dict[str, str]:
    """A table's first cells: the labels of an experiment's entries."""
    catalog = plan.catalog
    entries = (catalog.models[model], catalog.tasks[task], catalog.methods[method])
    return dict(zip(("Model", "Task", "Method"), (entry.label for entry in entries), strict=True))


def row(runs: pd.DataFrame, columns: list[str]) -> dict[str, Any]:
    """What an experiment reached and spent, as text; ``columns`` are further metrics and notes."""
    table = {
        "Test accuracy, %": spread(runs["test_accuracy"], 100),
        "Outcome": outcomes(runs["outcome"]),
        "Steps": f"{runs['steps'].mean():,.0f}",
        "Forward units": f"{runs['forward_units'].mean():,.0f}{unspent(runs)}",
        "FLOPs": si(runs["flops"].mean()),
        "Seconds": f"{runs['seconds'].mean():.1f}",
        "Peak beyond weights": mib(beyond(runs)),
        "Peak with weights": mib(beyond(runs) + runs["weights_bytes"].max()),
        "Test loss": f"{runs['test_loss'].mean():.2f}",
    }
    if "arrangement" in columns:
        table["Kept by"] = ", ".join(dict.fromkeys(runs["arrangement"].fillna(""))) or "-"
    return table | {f"{words(c)}, %": spread(runs[c], 100) for c in columns if c != "arrangement"}


def unspent(runs: pd.DataFrame) -> str:
    """`` (71 % of the budget)`` where that is the least that a completed run spent, and too little."""
    least = runs["spent"].min()
    return f" ({100 * least:.0f} % of the budget)" if least < ENOUGH else ""


def summary(plan: Plan, frames: Frames) -> pd.DataFrame:
    """One row an experiment as text, for people."""
    columns, rows = shown(frames.runs), {}
    for cell, runs in frames.runs.groupby(CELL, sort=False):
        rows[cell] = _named(plan, *cell[:3]) | row(runs, columns)
    for cell, count in frames.lacking.items():
        texts = rows.setdefault(cell, _named(plan, *cell[:3]))
        texts["Outcome"] = with_missing(texts.get("Outcome", ""), count)
    return pd.DataFrame(list(rows.values())).fillna("-")


def shown(runs: pd.DataFrame) -> list[str]:
    """Columns of metrics and notes that only some runs have, where these do."""
    noted = "arrangement" in runs and runs["arrangement"].fillna("").any()
    return ["arrangement"] * bool(noted) + [c for c in further(runs) if runs[c].notna().any()]


def beyond(runs: pd.DataFrame) -> float:
    """Bytes at the peak of a step beyond the frozen weights."""
    return float((runs["peak_bytes"] + runs["state_bytes"]).max())


def further(runs: pd.DataFrame) -> list[str]:
    """Columns of the test split's metrics beside accuracy and loss."""
    own = ("test_accuracy", "test_loss")
    return [c for c in runs if c.startswith("test_") and c not in own]


def words(column: str) -> str:
    """``Accuracy by generation`` for ``test_accuracy_by_generation``."""
    return column.removeprefix("test_").replace("_", " ").capitalize()


def cost_table(plan: Plan, frames: Frames) -> pd.DataFrame:
    """Cost of one optimiser step of every method, as text."""
    rows = []
    asked = frames.costs["allocated_bytes"].notna().any()  # an allocator was: a GPU's
    for row in frames.costs.itertuples():
        forwards = row.seconds / row.forward_seconds
        memory = {
            "Traced peak": _gib(row.predicted_bytes),
            "Allocated": _gib(row.allocated_bytes),
            "Reserved": _gib(row.reserved_bytes),
        }
        rows.append(
            _named(plan, row.model, row.task, row.method)
            | {
                "Forward units": f"{row.forward_units:.2f}",
                "Closed form": "-" if pd.isna(row.closed_form) else f"{row.closed_form:.3g}",
                "Time, forwards": "-" if math.isnan(forwards) else f"{forwards:.1f}",
                "FLOPs": si(row.flops),
                "Peak beyond weights": mib(row.peak_bytes + row.state_bytes),
            }
            | (memory if asked else {})
        )
    return pd.DataFrame(rows)


def cost_line(frames: Frames) -> str:
    """How the cost table came about, in one sentence each."""
    if frames.costs.empty:
        return "No costs were counted."
    ways = {"meta": "traced without weights"}
    counted = sorted({ways.get(name, f"counted on a {name}") for name in frames.costs["device"]})
    devices = sorted(set(frames.runs["device"]))
    text = (
        f"Cost of one optimiser step. FLOPs and peak bytes are {' or '.join(counted)}; times are "
        f"medians of the runs' own steps, in no-grad forwards of one batch ({', '.join(devices)})."
    )
    if frames.costs["allocated_bytes"].notna().any():
        text += (
            " Traced peak, allocated and reserved are all bytes at a step's peak, weights included: "
            "as traced beforehand on full-length batches, and as the device's allocator tells of the "
            "runs' largest step."
        )
    return text


def _gib(value: float) -> str:
    return "-" if pd.isna(value) else f"{value / 2**30:.2f} GiB"


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        cells = (" ".join(str(value).split()).replace("|", "\\|") for value in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def latex(table: pd.DataFrame, caption: str) -> str:
    """A booktabs table."""
    columns = "l" * 3 + "r" * (len(table.columns) - 3)
    escaped = caption.translate(LATEX)
    text = table.to_latex(index=False, escape=True, column_format=columns, caption=escaped)
    return "% needs \\usepackage{booktabs}\n" + text


def scale_line(plan: Plan) -> str:
    """What the figures rest on, in one sentence."""
    seeds = sorted({len(plan.seeds(cell)) for cell in plan.cells()})
    budgets = dict.fromkeys(cell.budget for cell in plan.cells())
    labels = "; ".join(plan.catalog.budgets[name].label for name in budgets)
    return (
        f"Study '{plan.name}' ({plan.study.scale} scale): {' or '.join(map(str, seeds))} "
        f"seed{'s' * (seeds[-1] > 1)}, budget{'s' * (len(budgets) > 1)} of {labels}"
        + (
            "; mean and, in brackets, 95 % interval over seeds (Student's t)."
            if seeds[-1] > 1
            else "."
        )
    )


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """``summary.{md,csv,tex}`` and ``cost.{md,csv}``."""
    caption = " ".join(map(str, filter(None, [frames.missing, scale_line(plan)])))
    table = summary(plan, frames)
    write_text(folder / "summary.md", f"{caption}\n\n{markdown(table)}")
    write_text(folder / "summary.csv", numbers(frames).to_csv(index=False))
    write_text(folder / "summary.tex", latex(table, caption))
    costs = cost_table(plan, frames)
    write_text(folder / "cost.md", f"{cost_line(frames)}\n\n{markdown(costs)}")
    write_text(folder / "cost.csv", frames.costs.to_csv(index=False))
