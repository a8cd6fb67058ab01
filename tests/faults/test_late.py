"""No study fails after its training for what it is: tables, figures, claims, the page and the excerpt of the
README come about whatever it compares and however its runs ended."""

from __future__ import annotations

import contextlib
import math

import pandas as pd
import pytest

from costbp.analysis import claims, figures, frames, readme, report, tables
from costbp.config import load_plan
from costbp.config.study import Block
from tests.conftest import ROOT
from tests.small_studies import coarse
from tests.test_page import built

REFERENCE, OTHERS = "bp_checkpointing", ("fmad_vanilla", "zo_vanilla")
ENDED = {
    "test_accuracy": None,
    "test_loss": None,
    "best_validation_accuracy": None,
    "finished": "2026",
}
NEVER = {"outcome": "does_not_fit", "steps": 0, "forward_units": 0.0, "flops": 0.0, "seconds": 0.0,
         "peak_bytes": 0, "state_bytes": 0, "weights_bytes": 0}  # fmt: skip


def block(*methods, model="minilm_head", task="trec", budget="units_400"):
    return Block(models=(model,), tasks=(task,), methods=methods, budgets=(budget,))


ALL = (REFERENCE, *OTHERS)
STUDIES = {  # experiments, seeds, and what has become of frames
    "as ever": ([block(*ALL)], 5, None),
    "one seed": ([block(*ALL)], 1, None),
    "the reference alone": ([block(REFERENCE)], 5, None),
    "no reference on a task": ([block(REFERENCE), block(*OTHERS, task="movie_reviews")], 5, None),
    "no reference on a budget": ([block(REFERENCE), block(*OTHERS, budget="units_8k")], 5, None),
    "none of one family": ([block(REFERENCE, "zo_vanilla")], 5, None),
    "BP alone": ([block(REFERENCE, "bp_vanilla")], 5, None),
    "one evaluation": ([block(*ALL)], 5, "end"),
    "no evaluation": ([block(*ALL)], 5, "none"),
    "all diverged at once": ([block(*ALL)], 5, "diverged"),
    "none fits": ([block(*ALL)], 5, "unfit"),
    "the reference does not fit": ([block(*ALL)], 5, "reference"),
    "nothing is learnt": ([block(*ALL)], 5, "flat"),
    "losses are not finite": ([block(*ALL)], 5, "loss"),
}  # fmt: skip


def ended(kind, found):
    """Frames of a study whose runs ended otherwise."""
    runs, curves = found.runs, found.curves
    if kind == "end":
        curves = curves[curves["step"] == curves["step"].max()]
    elif kind in ("none", "diverged", "unfit"):
        curves = curves[:0]
        runs = runs.assign(**ENDED, **({"outcome": kind} if kind == "diverged" else {}))
        runs = runs.assign(**NEVER) if kind == "unfit" else runs
    elif kind == "reference":
        mine = runs["method"] == REFERENCE
        runs = pd.concat([runs[mine].assign(**ENDED, **NEVER), runs[~mine]], ignore_index=True)
        curves = curves[curves["method"] != REFERENCE]
    elif kind == "flat":
        curves = curves.assign(validation_accuracy=0.2)
        runs = runs.assign(test_accuracy=0.2, best_validation_accuracy=0.2)
    elif kind == "loss":
        curves = curves.assign(validation_loss=math.nan)
        runs = runs.assign(test_loss=math.inf)
    return frames.Frames(runs, curves, found.costs)


@pytest.mark.parametrize("name", STUDIES)
def test_what_people_read_comes_about(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", coarse)
    blocks, seeds, kind = STUDIES[name]
    with contextlib.chdir(ROOT):
        plan = load_plan()
    paths = plan.study.paths.model_copy(
        update={key: tmp_path / key for key in ("store", "results", "reports")}
    )
    update = {"experiments": tuple(blocks), "seeds": tuple(range(seeds)), "paths": paths}
    plan = plan.model_copy(update={"study": plan.study.model_copy(update=update)})
    found = built(plan)
    further = {"tuned": True, "spikes": 0, "spike_loss": math.nan, "arrangement": ""}
    found = ended(kind, frames.Frames(found.runs.assign(**further), found.curves, found.costs))
    frames.save(found, plan.results)
    found, folder = frames.load(plan.results), paths.reports
    tables.write(plan, found, folder / "tables")
    figures.write(plan, found, folder / "figures")
    claims.write(plan, found, folder)
    report.write(plan, found, folder)
    judged = report.read_claims(folder)
    assert len(judged) == len(plan.claims) and all(claim["verdict"] for claim in judged)
    assert readme.excerpt(plan, found, judged)
