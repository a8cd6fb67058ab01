"""The page of costs at full size: figures and a table from traced steps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from costbp.analysis.frames import labelled
from costbp.analysis.outputs import COSTS
from costbp.analysis.panels import save
from costbp.analysis.report import pictures, render
from costbp.analysis.tables import markdown, si
from costbp.config.cards import card
from costbp.config.study import Plan
from costbp.cost.record import Fit, read_costs, read_records
from costbp.errors import UserError
from costbp.files import write_text

GIB = 2**30


def read(plan: Plan) -> dict[str, pd.DataFrame]:
    """What has been traced, by the kind of question: traces, sweeps, fits. Costs with ``bytes`` and
    ``beyond`` of each.

    Raises:
        UserError: the study has no ``costs``, or a file is missing.
    """
    costs = plan.study.costs
    if costs is None:
        raise UserError(
            f"study '{plan.name}' has no `costs`; config/studies/full_size.yaml is one that has"
        )
    folder = plan.results / "costs"
    found = {}
    for kind, names in {"traces": costs.models, "sweeps": costs.sweeps}.items():
        found[kind] = pd.DataFrame(
            {**record.model_dump(), "bytes": record.bytes, "beyond": record.beyond, "sweep": name}
            for name in names
            for record in read_costs(folder / kind / f"{name}.json")
        )
    files = [folder / "fits" / f"{name}.json" for name in (costs.fits.models if costs.fits else ())]
    found["fits"] = pd.DataFrame(
        fit.model_dump() for file in files for fit in read_records(file, Fit)
    )
    return found


def table(plan: Plan, traces: pd.DataFrame) -> pd.DataFrame:
    """A row per model and method, in words."""
    frame = labelled(plan, traces)
    name = plan.study.costs.card if plan.study.costs else None
    found = pd.DataFrame(
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
    if name is not None:
        spent = frame["seconds_by_card"].map(lambda by_card: by_card[name])
        found[f"Seconds on {name}"] = spent.map("{:.3g}".format)
        found["Joules"] = (spent * card(name).watts).map("{:.3g}".format)
    return found


def write(plan: Plan, folder: Path) -> None:
    """``costs.{md,csv}``, figures as PNG and PDF, and the self-contained page ``index.html``."""
    found = read(plan)
    figures = [figure for figure in COSTS if len(found[figure.frame])]
    for figure in figures:
        save(figure.draw(plan, found[figure.frame]), folder / figure.name)
    words = table(plan, found["traces"])
    write_text(folder / "costs.md", markdown(words))
    write_text(
        folder / "costs.csv",
        found["traces"].drop(columns=["sweep", "seconds_by_card"]).to_csv(index=False),
    )
    models = [plan.catalog.models[name] for name in dict.fromkeys(found["traces"]["model"])]
    text = render(
        "costs.html.j2",
        costs=plan.study.costs,
        packed=[m.label for m in models if getattr(m.source, "bits", None)],
        table=words,
        figures=pictures(figures, folder),
    )
    write_text(folder / "index.html", text)
