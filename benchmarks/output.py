"""Tables on stdout; JSON, a table and a plot in the output folder."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pandas as pd
import seaborn as sns
import torch

from benchmarks.rows import FLOPS, PEAK, TIME, Results
from costbp.console import table
from costbp.files import atomic, write_text

PANELS = {"units": FLOPS, "times": TIME, "peak": PEAK}
TICKS = tuple(2**power for power in range(9))


def print_costs(results: Results) -> None:
    """Every method of every case; what people use today is marked."""
    rows = [
        (
            cost.case,
            f"{cost.method} *" if cost.today else cost.method,
            f"{cost.units:.3f}",
            "-" if cost.times is None else f"{cost.times:.2f}",
            "-" if cost.peak is None else f"{cost.peak:.2f}",
        )
        for cost in results.costs
    ]
    table("Costs (* = what people use today)", ("case", "method", FLOPS, TIME, PEAK), rows)


def target_rows(results: Results) -> list[tuple[str, ...]]:
    """One row per target: the measured range over cases and the worst case."""
    rows: list[tuple[str, ...]] = []
    for (what, quantity), checks in results.grouped().items():
        low, *_, high = sorted([checks[0], *checks], key=lambda check: check.measured)
        worst = low if checks[0].at_least else high
        span = f"{low.measured:.3g} to {high.measured:.3g}"
        missed = sum(not check.ok for check in checks)
        verdict = f"MISSED {missed} of {len(checks)}" if missed else "ok"
        rows.append(
            (
                what,
                quantity,
                _bounds(checks),
                span if low.measured != high.measured else f"{low.measured:.3g}",
                worst.case,
                verdict if any(check.target is not None for check in checks) else "-",
            )
        )
    return rows


def _bounds(checks: list[Any]) -> str:
    return " or ".join(dict.fromkeys(check.bound for check in checks))


HEAD = ("what", "quantity", "target", "measured", "worst case", "ok")


def print_targets(results: Results) -> None:
    table("Targets", HEAD, target_rows(results))


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def save(results: Results, folder: Path, about: dict[str, Any]) -> None:
    """``results.json``, ``targets.md`` and ``costs.png`` in ``folder``."""
    text = json.dumps({"machine": about, **results.plain()}, indent=1)
    write_text(folder / "results.json", text + "\n")
    lines = [HEAD, ("---",) * len(HEAD), *target_rows(results)]
    write_text(folder / "targets.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    if results.costs:
        with atomic(folder / "costs.png") as path:
            _plot(results).savefig(path, format="png", dpi=150)


def _plot(results: Results) -> Any:
    """A panel per quantity, a row per method, a point per case."""
    wide = pd.DataFrame([vars(cost) for cost in results.costs])
    wide["who"] = wide["today"].map({False: "costbp", True: "used today"})
    frame = wide.melt(
        id_vars=["method", "case", "who"],
        value_vars=list(PANELS),
        var_name="quantity",
        value_name="ratio",
    ).dropna()
    frame["quantity"] = frame["quantity"].map(PANELS)
    methods = list(dict.fromkeys(wide["method"]))
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.3)
    height = 1.6 + 0.38 * len(methods)  # inches
    grid = sns.FacetGrid(frame, col="quantity", sharex=False, height=height, aspect=0.75)
    grid.map_dataframe(
        sns.stripplot,
        x="ratio",
        y="method",
        hue="who",
        order=methods,
        hue_order=["costbp", "used today"],
        palette=sns.color_palette("colorblind")[:2],
        alpha=0.7,
        jitter=0.15,
        size=6,
    )
    grid.set_titles("{col_name}").set_axis_labels("times a forward", "")
    for axis in grid.axes.flat:
        axis.set_xscale("log", base=2)
        low, high = axis.get_xlim()
        shown = [tick for tick in TICKS if low <= tick <= high]
        axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axis.grid(axis="y", alpha=0.4)
    grid.add_legend(title="")
    return grid
