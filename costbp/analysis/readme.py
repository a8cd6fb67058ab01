"""The README's excerpt of a study: made of the same records as the page, so that it can't differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from costbp.analysis.frames import Frames
from costbp.analysis.report import DECIDED, UNTESTED, provenance, read_claims
from costbp.analysis.tables import SETTING, markdown, scale_line, spread
from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.files import write_text

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def excerpt(plan: Plan, frames: Frames, claims: list[dict[str, Any]]) -> str:
    """Accuracy of the methods that most settings have, conclusions, and what they rest on."""
    said = [
        f"- {claim['title']}, {claim['verdict']} ({claim['ledger']}): {claim['conclusion']}"
        for claim in claims
        if claim["verdict"] in DECIDED
    ]
    open_ones = [claim for claim in claims if claim["verdict"] not in (*DECIDED, UNTESTED)]
    untested = [claim for claim in claims if claim["verdict"] == UNTESTED]
    for name, found in (("Undecided", open_ones), ("Not tested here", untested)):
        said += [f"- {name}: {', '.join(claim['title'] for claim in found)}."] if found else []
    facts = provenance(plan, frames)
    return (
        f"{scale_line(plan)} Test accuracy in %; an asterisk: not every run completed.\n\n"
        + markdown(table(plan, frames.runs))
        + "\n{}\n\n".format("\n".join(said))
        + f"Commit {facts['commit']}, {facts['device']}; runs: {facts['runs']}; {facts['compute']}; largest "
        f"process: {facts['largest process']}. Written by `costbp report --readme`, not by hand."
    )


def table(plan: Plan, runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method that at least half of the settings have, a column a setting."""
    catalog, columns = plan.catalog, dict[str, dict[str, str]]()
    parts = list(runs.groupby(SETTING, sort=False))
    counts = runs.drop_duplicates([*SETTING, "method"])["method"].value_counts(sort=False)
    kept = {m: catalog.methods[m].label for m in counts.index[counts >= len(parts) / 2]}
    for (model, task, budget), part in parts:
        entries = catalog.models[model], catalog.tasks[task], catalog.budgets[budget]
        names = entries[0].label, entries[1].label.partition(" (")[0]
        name = ", ".join(names)
        if name in columns:
            name += f", {entries[2].label}"
        cells = columns.setdefault(name, {"budget": f"{entries[2].amount:,g} {entries[2].unit}"})
        for method, label in kept.items():
            found = part[part["method"] == method]
            star = "*" * bool((found["outcome"] != "completed").any())
            cells[label] = spread(found["test_accuracy"], 100) + star if len(found) else ""
        cells["a constant answer"] = f"{100 * part['majority'].max():.1f}"
    return pd.DataFrame(columns).rename_axis("Method").reset_index()


def write(plan: Plan, frames: Frames, folder: Path, readme: Path) -> None:
    """Replace what stands between the markers of ``readme``.

    Raises:
        UserError: the file has no such markers.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(
            f"{readme}: no lines '{BEGIN}' and '{END}' between which results could stand"
        )
    block = excerpt(plan, frames, read_claims(folder))
    write_text(readme, f"{before}{BEGIN}\n{block}\n{END}{after}")
