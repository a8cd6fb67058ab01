"""The self-contained page ``index.html``."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from costbp.analysis.finding import how_worded
from costbp.analysis.frames import Frames
from costbp.analysis.outputs import REPORT
from costbp.analysis.readings import LEARNT
from costbp.analysis.tables import (
    cost_line,
    cost_table,
    metric_table,
    scale_line,
    spread,
    summary,
)
from costbp.config.study import Plan
from costbp.files import write_text
from costbp.train.record import NOISE

NAMES = {"fmad": "FmAD", "zo": "ZO"}


def headline(plan: Plan, frames: Frames) -> list[dict[str, Any]]:
    """Outcome first: per (model, task, budget) the reference and the best method of each other family."""
    cards = []
    for (model, task, budget), runs in frames.runs.groupby(["model", "task", "budget"], sort=False):
        rows = []
        shown = runs[(runs["family"] != "bp") | (runs["method"] == plan.reference)]
        for family, part in shown.dropna(subset="test_accuracy").groupby("family"):
            mean = part.groupby("method")["test_accuracy"].mean()
            best = f"best {NAMES[family]}: " if family in NAMES else ""
            rows.append(
                {
                    "title": best + plan.catalog.methods[mean.idxmax()].label,
                    "accuracy": spread(
                        part.loc[part["method"] == mean.idxmax(), "test_accuracy"], 100
                    ),
                    "value": mean.max(),
                    "family": family,
                }
            )
        cards.append(
            {
                "task": plan.catalog.tasks[task].label,
                "model": plan.catalog.models[model].label,
                "budget": plan.catalog.budgets[budget].label,
                "majority": float(runs["majority"].iloc[0]),
                "d": int(runs["d"].max()),
                "rows": rows,
            }
        )
    return cards


def unusual(frames: Frames) -> pd.DataFrame:
    """Runs that did not complete: results too, never hidden."""
    columns = ["model", "task", "method", "budget", "seed", "outcome", "message"]
    return frames.runs.loc[frames.runs["outcome"] != "completed", columns]


def notes(plan: Plan, frames: Frames) -> list[str]:
    """What a reader must know to read the figures right; each sentence follows from the data."""
    cards = headline(plan, frames)
    shown = dict.fromkeys(row["family"] for card in cards for row in card["rows"])
    best = " and ".join(NAMES[family] for family in shown if family in NAMES)
    chosen = (
        f" The cards show the best {best} method by that very accuracy, a choice in their favour."
    )
    found = [
        "A forward unit is the FLOPs of one no-grad forward of one batch. Evaluation is not "
        "charged; a run stops before the step that would exceed its budget.",
        "Curves show the validation split; the summary's accuracy is measured once, on the test "
        "split, at the end of the budget." + (chosen if best else ""),
    ]
    models = (
        plan.catalog.models[name] for name in dict.fromkeys(model for model, _ in plan.pairs())
    )
    if heads := ", ".join(model.label for model in models if model.reads == "features"):
        found.append(
            f"{heads}: the frozen encoder's features are computed once and cached, so the unit is "
            "the forward of what still runs, the head. Units of different models can't be added "
            "or compared, and checkpointing has nothing to recompute there."
        )
    choices = [plan.choice(cell) for cell in plan.cells()]
    tuned = sum(choice.tuned for choice in choices)
    total, trials = len(choices), plan.study.tuning.trials
    used_by = {
        f"{tuned} of {total} experiments use the choice of {trials} trials on the validation split, at "
        "the same total of forward units for every method": tuned,
        f"{total - tuned} of {total} are not tuned": total - tuned,
    }
    used = "; ".join(text for text, count in used_by.items() if count)
    found.append(f"Optimiser and learning rate: {used}.")
    found += differences(plan, frames)
    stuck = [
        f"{row['title']} on {card['task']} ({card['model']})"
        for card in cards
        for row in card["rows"]
        if row["family"] in NAMES and row["value"] < card["majority"] + LEARNT
    ]
    if stuck:
        found.append(
            f"Within this budget not even these left the majority class by {100 * LEARNT:g} points, "
            f"so nothing can be said of their convergence: {'; '.join(stuck)}."
        )
    return found


def differences(plan: Plan, frames: Frames) -> list[str]:
    """How ZO's differences were taken, and which of them are mostly noise."""
    probed = frames.runs[frames.runs["difference_snr"].notna()]
    if probed.empty:
        return []
    steps = sorted({f"{eps:g}" for eps in probed["eps"]}, key=float)
    wide = probed["float32"].astype(bool).sum()
    found = [
        f"Steps of differences were probed before each run on its first batch (eps "
        f"{', '.join(steps)}; {probed['probe_forwards'].mean():.0f} forwards a run on average, "
        "recorded and not charged to the budget)."
        + (
            f" {wide} of {len(probed)} runs compute their losses in float32, since rounding of the "
            "base's half precision would drown them."
            if wide
            else ""
        )
    ]
    noisy = probed[probed["difference_snr"] <= NOISE]
    for (model, method), runs in noisy.groupby(["model", "method"], sort=False):
        found.append(
            f"{plan.catalog.methods[method].label} on {plan.catalog.models[model].label}: the "
            f"differences of {len(runs)} runs are mostly noise at every step that was tried (signal "
            f"to noise {runs['difference_snr'].min():.2g} in power); a comparison with them says "
            "nothing of the method."
        )
    return found


def provenance(plan: Plan, frames: Frames) -> dict[str, str]:
    """Versions, commits, devices of the runs."""
    names = ["commit", "costbp", "torch", "transformers", "peft", "python", "device", "machine"]
    found = {name: ", ".join(sorted(set(map(str, frames.runs[name])))) for name in names}
    ended = sorted(frames.runs["finished"])
    found["runs"] = f"{len(frames.runs)}, finished {ended[0]} to {ended[-1]}"
    hours = frames.runs[["seconds", "evaluation_seconds"]].sum().sum() / 3600
    found["compute"] = f"{hours:.2f} device hours of training and evaluation"
    found["largest process"] = f"{frames.runs['rss_bytes'].max() / 2**30:.2f} GiB resident"
    return found


def embedded(picture: Path) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    loader = PackageLoader("costbp.analysis", "templates")
    pages = Environment(undefined=StrictUndefined, autoescape=True, loader=loader)
    return pages.get_template(template).render(**values)


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """``index.html``: one file that needs nothing else."""
    seeds = max(len(plan.seeds(cell)) for cell in plan.cells())
    pictures = folder / "figures"
    claims = json.loads((folder / "claims.json").read_text())["claims"]
    methods = dict.fromkeys(cell.method for cell in plan.cells())
    text = render(
        "index.html.j2",
        study=plan.study,
        scale=scale_line(plan),
        cards=headline(plan, frames),
        claims=claims,
        verdicts=how_worded(plan.study.scale),
        summary=summary(plan, frames),
        metrics=metric_table(plan, frames),
        costs=cost_table(plan, frames),
        cost_line=cost_line(frames),
        unusual=unusual(frames),
        figures={f.name: (f.words(seeds), embedded(pictures / f"{f.name}.png")) for f in REPORT},
        notes=notes(plan, frames),
        methods={name: plan.catalog.methods[name] for name in methods},
        choices=frames.runs.groupby(["model", "task", "method"], sort=False)["optimizer"]
        .first()
        .reset_index(),
        provenance=provenance(plan, frames),
    )
    write_text(folder / "index.html", text)
