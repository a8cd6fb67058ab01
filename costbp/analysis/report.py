"""The self-contained page ``index.html``: outcome first, and from each number a link to its runs."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from itables.utils import read_package_file
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from costbp.analysis.claims import warnings
from costbp.analysis.finding import how_worded
from costbp.analysis.frames import CELL, Frames
from costbp.analysis.outputs import REPORT, Figure
from costbp.analysis.panels import EMPTY, INK, LINE
from costbp.analysis.tables import (
    SETTING,
    address,
    cost_line,
    cost_table,
    leaders,
    row,
    run_folder,
    scale_line,
    shown,
    with_missing,
)
from costbp.config.study import Cell, Plan
from costbp.files import write_text
from costbp.train.record import NOISE

Claims = list[dict[str, Any]]
DECIDED, UNTESTED = ("holds here", "does not hold here"), "not tested here"
ROOM = 4_000_000  # characters of drawings on a page
LEADING = re.compile(r"^[<>=≥≤ ]*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?: ?(KiB|MiB|GiB|[kMGTP])\b)?")
PLACES = re.compile(
    r' (?:d|x|y|points|transform)="[^"]*"'
)  # attributes of an SVG that hold numbers alone
FACTOR = {name: 1024.0**n for n, name in enumerate(("KiB", "MiB", "GiB"), 1)}
FACTOR |= {name: 1000.0**n for n, name in enumerate("kMGTP", 1)}


def order_of(cell: Any) -> float | None:
    """The number by which a cell is sorted: the one it begins with, its unit taken into account; of a
    dash -1, of other text none."""
    text = Markup(cell).striptags() if isinstance(cell, Markup) else str(cell)
    found = LEADING.match(text)
    if found is None:
        return -1.0 if text == "-" else None
    return float(found[1].replace(",", "")) * FACTOR.get(found[2] or "", 1.0)


def link(plan: Plan, folder: str | os.PathLike[str], text: str) -> Markup:
    """``text`` that leads from the page to a folder."""
    return Markup('<a href="{}">{}</a>').format(address(folder, plan.study.paths.reports), text)


def settings(plan: Plan, frames: Frames) -> list[dict[str, Any]]:
    """Every (model, task, budget): a table with a row a method, with links to its runs, and of the
    methods that lead their family what stands first on the page."""
    found, catalog, best = [], plan.catalog, leaders(plan, frames.runs)
    for (model, task, budget), group in frames.runs.groupby(SETTING, sort=False):
        rows, columns, leading = [], shown(group), []
        for method, runs in group.groupby("method", sort=False):
            cell, entry = Cell(model, task, method, budget), catalog.methods[method]
            texts = row(runs, columns)
            accuracy = link(plan, plan.study.paths.store.joinpath(*cell), texts["Test accuracy, %"])
            texts["Outcome"] = with_missing(texts["Outcome"], frames.lacking[cell])
            links = [link(plan, run_folder(plan, run), str(run.seed)) for run in runs.itertuples()]
            texts |= {"Test accuracy, %": accuracy, "Seeds": Markup(" ").join(links)}
            untuned = "tuned" in runs and not runs["tuned"].all()
            texts["Optimiser"] = runs["optimizer"].iloc[0] + ", untuned" * untuned
            rows.append({"Method": entry.label} | texts)
            if cell in best and runs["test_accuracy"].notna().any():
                value = runs["test_accuracy"].mean()
                leading.append((entry.label, entry.family, accuracy, value))
        found.append(
            {
                "task": catalog.tasks[task].label,
                "model": catalog.models[model].label,
                "budget": catalog.budgets[budget].label,
                "majority": float(group["majority"].iloc[0]),
                "d": int(group["d"].max()),
                "best": leading,
                "rows": pd.DataFrame(rows, dtype=object),
            }
        )
    return found


def unusual(frames: Frames) -> pd.DataFrame:
    """Runs that did not complete: results too, never hidden."""
    columns = [*CELL, "seed", "outcome", "message"]
    return frames.runs.loc[frames.runs["outcome"] != "completed", columns]


def bounds(claim: Mapping[str, Any]) -> str:
    """A claim's interval in words; nothing where it has none."""
    named = {"at least": claim["low"], "at most": claim["high"]}
    ends = {words: f"{end:.4g}" for words, end in named.items() if end is not None}
    text = " to ".join(ends.values()) if len(ends) == 2 else " ".join(sum(ends.items(), ()))
    return f"{text} {claim['unit']}" if ends else ""


def with_links(plan: Plan, claims: Claims) -> Claims:
    """Claims whose rows lead to the runs of both methods, filed by side."""

    for claim in claims:
        claim["sides"] = {"for": [], "against": [], "undecided": []}
        for found in claim["rows"]:
            folders = dict.fromkeys(Path(run).parent for run in found["runs"])
            found["links"] = [link(plan, folder, folder.parent.name) for folder in folders]
            claim["sides"][found["side"]].append(found)
    return claims


def notes(plan: Plan, frames: Frames) -> list[str]:
    """What a reader must know to read the figures right; each sentence follows from the data."""
    found = [
        "A forward unit is the FLOPs of one no-grad forward of one batch. Evaluation is not "
        "charged; a run stops before the step that would exceed its budget.",
        "Curves show the validation split; the tables' accuracy is measured once, on the test split. "
        "The best method of a family is that of the highest validation accuracy, a choice in favour "
        "of FmAD and ZO.",
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


def embedded(picture: Path) -> Markup:
    """An SVG for a page: in the page's colours, its links seen from the page, with what each says as
    a tooltip."""

    def anchor(found: re.Match[str]) -> str:
        folder, _, tip = found[1].partition("#")
        return f'<a href="{os.path.normpath(os.path.join("figures", folder))}"><title>{tip}</title>'

    text = picture.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = PLACES.sub(lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)  # hundredths of a point
    text = re.sub(r'\n\s+|font-family: [^;"]*;? ?', lambda m: m[0][:1].strip("f"), text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the page's names are not a figure's
    text = re.sub(r'<a xlink:href="([^"]*)"[^>]*>', anchor, text)
    return Markup(text.replace(INK, "currentColor").replace(LINE, "var(--line)"))


def render(template: str, **values: Any) -> str:
    """A page from one of the package's templates."""
    loader = PackageLoader("costbp.analysis", "templates")
    pages = Environment(undefined=StrictUndefined, autoescape=True, loader=loader)
    pages.filters["order"] = order_of
    script = base64.b64encode(read_package_file("html", "dt_bundle.js").encode()).decode()
    style = Markup(read_package_file("html", "dt_bundle.css"))
    return pages.get_template(template).render(tables_js=script, tables_css=style, **values)


def write(plan: Plan, frames: Frames, folder: Path) -> None:
    """``index.html``: one file that needs nothing else."""
    seeds = max(len(plan.seeds(cell)) for cell in plan.cells())
    claims = read_claims(folder)
    methods = dict.fromkeys(cell.method for cell in plan.cells())
    rest = unusual(frames).astype(object)
    for index, run in zip(rest.index, frames.runs.loc[rest.index].itertuples(), strict=True):
        rest.at[index, "seed"] = link(plan, run_folder(plan, run), str(run.seed))
    text = render(
        "index.html.j2",
        study=plan.study,
        scale=scale_line(plan),
        warnings=warnings(frames),
        missing=frames.missing and frames.missing.runs,
        claims=with_links(plan, claims),
        decided=[claim for claim in claims if claim["verdict"] in DECIDED],
        undecided=[c for c in claims if c["verdict"] not in (*DECIDED, UNTESTED)],
        untested=[claim for claim in claims if claim["verdict"] == UNTESTED],
        bounds=bounds,
        verdicts=how_worded(plan.study.scale),
        settings=settings(plan, frames),
        costs=cost_table(plan, frames),
        cost_line=cost_line(frames),
        unusual=rest,
        figures=pictures(REPORT, folder / "figures", seeds),
        notes=notes(plan, frames),
        methods={name: plan.catalog.methods[name] for name in methods},
        provenance=provenance(plan, frames),
    )
    write_text(folder / "index.html", text)


def read_claims(folder: Path) -> Claims:
    """What was judged."""
    found: Claims = json.loads((folder / "claims.json").read_text(encoding="utf-8"))["claims"]
    return found


def pictures(
    figures: Iterable[Figure], folder: Path, seeds: int = 1
) -> dict[str, tuple[str, Markup]]:
    """Name -> caption and drawing of the figures that show something; of those for which there is no
    room on a page, a link."""
    found, room = {}, ROOM
    for figure in figures:
        drawing = embedded(folder / f"{figure.name}.svg")
        if EMPTY in drawing:
            continue
        room -= len(drawing)
        if room < 0:
            drawing = Markup('<a href="figures/{0}.svg">figures/{0}.svg</a>').format(figure.name)
        found[figure.name] = (figure.words(seeds), drawing)
    return found
