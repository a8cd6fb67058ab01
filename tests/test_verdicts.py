"""What is not compared and why, and how verdicts are worded: every bad input, and counted costs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from costbp.analysis.arms import Arm, Evidence
from costbp.analysis.claims import judge, page, warnings, write
from costbp.analysis.finding import Finding, Row, how_worded
from costbp.analysis.frames import Frames, spikes
from costbp.analysis.readings import READINGS
from costbp.analysis.statistics import Sample
from costbp.analysis.tables import unspent
from costbp.config import Cell, load_plan
from costbp.config.claims import Magnitude
from tests.conftest import ROOT
from tests.simulated import SEEDS, Truth, found, only, others, simulate, study


@pytest.fixture(scope="module")
def plan():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return study(load_plan())


# --- what is left out --------------------------------------------------------------------------------


def reasons(plan, frames) -> set[str]:
    return {part["reason"] for part in found(plan, frames)["accuracy"]["left_out"]}


def change(frames: Frames, rows: pd.Series, **values) -> Frames:
    runs = frames.runs.copy()
    for name, value in values.items():
        runs.loc[rows, name] = value
    return dataclasses.replace(frames, runs=runs)


@pytest.fixture
def told(plan):
    """One comparison a model and task, and frames in which it is decided."""
    plan = only(plan, "accuracy", methods=("zo_vanilla",))
    return plan, simulate(plan, others(Truth(0.55), plan))


def test_one_seed_settles_nothing(told):
    plan, frames = told
    plan = plan.model_copy(update={"study": plan.study.model_copy(update={"seeds": (0,)})})
    one = Frames(*(f[f["seed"] == 0] for f in (frames.runs, frames.curves)), frames.costs)
    claim = found(plan, one)["accuracy"]
    assert (
        claim["verdict"] == "inconclusive here" and claim["needs"] == "5 seeds of each experiment"
    )
    assert claim["left_out"][0]["reason"].startswith("1 seed, 5 are needed (measured: +")


def test_untuned_runs_settle_nothing(told):
    plan, frames = told
    claim = found(plan, change(frames, frames.runs["method"] == "zo_vanilla", tuned=False))[
        "accuracy"
    ]
    assert claim["verdict"] == "untuned" and claim["ledger"] == "inconclusive"
    assert "snakemake tune" in claim["needs"] and "measured: +" in claim["left_out"][0]["reason"]


def test_missing_failed_diverged_and_unfit_runs_are_said(told):
    plan, frames = told
    zo = frames.runs["method"] == "zo_vanilla"
    some = zo & frames.runs["seed"].isin([0, 1])
    gone = dataclasses.replace(frames, runs=frames.runs[~zo])
    assert reasons(plan, gone) == {"ZO-Vanilla has no runs"}
    fewer = dataclasses.replace(frames, runs=frames.runs[~some])
    assert reasons(plan, fewer) == {"ZO-Vanilla has 3 of 5 runs (missing)"}
    failed = change(frames, some, outcome="failed", test_accuracy=np.nan)
    assert reasons(plan, failed) == {"ZO-Vanilla has 3 of 5 runs (failed)"}
    diverged = change(frames, some, outcome="diverged")
    assert reasons(plan, diverged) == {"ZO-Vanilla diverged in 2 of 5 seeds"}
    unfit = change(frames, zo, outcome="does_not_fit", test_accuracy=np.nan)
    assert reasons(plan, unfit) == {"ZO-Vanilla: does not fit"}
    assert found(plan, unfit)["accuracy"]["needs"] == "a larger device or a smaller model"


def test_a_method_that_learnt_nothing_is_no_opponent(told):
    plan, _ = told
    flat = simulate(plan, others(Truth(0.41), plan))
    assert "ZO-Vanilla learnt nothing" in reasons(plan, flat).pop()
    low = simulate(plan, others(Truth(0.6), plan))
    low = change(low, low.runs["method"] == "zo_vanilla", test_accuracy=0.25)  # majority 0.23
    assert "ZO-Vanilla learnt nothing" in reasons(plan, low).pop()


def test_memories_that_differ_are_not_compared(told):
    plan, frames = told
    zo = frames.runs["method"] == "zo_vanilla"
    small = change(frames, zo, weights_bytes=1e7)
    assert "weights included" in reasons(plan, small).pop()
    assert reasons(plan, change(small, slice(None), ceiling_bytes=1.2e8)) == set()


def test_one_trajectory_has_one_vote(plan):
    frames = simulate(plan, others(Truth(0.55), plan))
    words = frames.curves["model"].eq("minilm_words") & frames.curves["task"].eq("trec")
    zo, fmad = (words & frames.curves["method"].eq(f"{kind}_vanilla") for kind in ("zo", "fmad"))
    curves = frames.curves.copy()
    for name in ("step", "validation_accuracy", "validation_loss"):
        curves.loc[zo, name] = curves.loc[fmad, name].to_numpy() * (
            1 + 1e-6 * (name[-4:] == "loss")
        )
    claims = found(plan, dataclasses.replace(frames, curves=curves))
    names = [
        row["name"] for row in claims["accuracy"]["rows"] if "minilm_words/trec" in row["name"]
    ]
    both = "BP-Checkpointing against FmAD-Vanilla = ZO-Vanilla, minilm_words/trec/units_4k"
    assert names.count(both) == 1 and len(names) == 5  # six other methods
    row = next(row for row in claims["accuracy"]["rows"] if row["name"] == both)
    assert len(row["runs"]) == 3 * len(SEEDS)
    same = [part["reason"] for part in claims["zo_bench"]["left_out"]]
    assert "both are the same trajectory" in same


def test_mixed_commits_are_said(told):
    plan, frames = told
    mixed = change(frames, frames.runs["seed"] == 0, commit="def")
    assert "2 commits" in warnings(mixed)[0]
    assert "2 commits" in page(plan, judge(Evidence(plan, mixed)), warnings(mixed))


def test_unequal_units_are_said(told):
    frames = told[1]
    assert warnings(frames) == []  # as an older version aggregated them
    zo = frames.runs["method"] == "zo_vanilla"
    runs = frames.runs.assign(spent=np.where(zo & (frames.runs["seed"] == 0), 0.71, 0.99))
    said = warnings(dataclasses.replace(frames, runs=runs))
    assert len(said) == len({text.partition(":")[0] for text in said}) > 1
    assert all("exceeded it: zo_vanilla 71 %, and others up to 99 %" in text for text in said)
    assert unspent(runs[zo]) == " (71 % of the budget)" and unspent(runs[~zo]) == ""


def test_an_unreached_target_is_said(plan):
    plan = only(plan, "fzoo_speed")
    frames = simulate(plan, others(Truth(0.47), plan) | {"bp_checkpointing": Truth(0.9)})
    claim = found(plan, frames)["fzoo_speed"]
    assert (
        claim["left_out"][0]["reason"]
        == "in some seed neither reached 25 %, or both before evaluations begin"
    )
    assert claim["needs"] == "a longer budget: a target was reached by neither method"


# --- costs, words, files -----------------------------------------------------------------------------


def cost(model, method, flops, peak, weights=0):
    return {"model": model, "task": "trec", "method": method, "flops": flops, "peak_bytes": peak,
            "state_bytes": 0, "weights_bytes": weights, "seq": 8, "forward_units": flops}  # fmt: skip


def test_costs_are_exact_and_bounded(plan):
    rows = [("bp_vanilla", 200, 90), ("bp_checkpointing", 300, 20), ("fmad_vanilla", 200, 40), ("zo_multiple", 1600, 5)]  # fmt: skip
    costs = pd.DataFrame([cost("minilm_words", *row) for row in rows])
    frames = dataclasses.replace(simulate(plan), costs=costs)
    claims = found(plan, frames)
    assert claims["compute_per_step"]["measured"] == "0.667x to 5.33x"
    assert claims["compute_per_step"]["magnitude"] == "reached"
    assert [row["side"] for row in claims["compute_per_step"]["rows"]] == ["against", "for"]
    assert [row["side"] for row in claims["memory_beyond"]["rows"]] == ["for", "against"]
    assert claims["memory_beyond"]["rows"][1]["estimate"] == pytest.approx(4)
    traced = pd.DataFrame([cost("qwen2_5_0_5b", "zo_vanilla", 2, 10, 2**30 // 2), cost("qwen2_5_0_5b", "bp_checkpointing", 3, 2**30, 2**30 // 2)])  # fmt: skip
    claim = plan.claims["on_device"]
    traces = {claim.traced.file("qwen2_5_0_5b"): traced}
    device = found(plan, frames, traces)["on_device"]
    assert [row["side"] for row in device["rows"]] == ["for", *["undecided"] * 4]
    assert device["verdict"] == "inconclusive here", "a grid of sizes on which both end at the same"
    assert device["needs"] == claim.takes != ""
    assert found(plan, frames, traces)["mebp_time"]["rows"][0]["text"] == "1.5x"


def test_preconditions_and_scale_word_the_ledger(plan):
    names = dict.fromkeys(("name", "model", "task", "budget", "method", "against"), "")
    row = Row(Sample(np.array([0.3, 0.31, 0.32, 0.3, 0.31])), "", **names, folders=[])
    finding = Finding("", "", "points", Magnitude(value=20, units=("points",)), rows=[row])
    assert finding.ledger("full") == "verified" and finding.ledger("reduced") == "toy"
    unreached = dataclasses.replace(finding, magnitude=Magnitude(value=40, units=("points",)))
    assert unreached.verdict == "holds here" and unreached.ledger("full") == "inconclusive"
    against = dataclasses.replace(
        finding, rows=[dataclasses.replace(row, sample=Sample(-row.sample.values))]
    )
    assert against.ledger("full") == "falsified" and against.ledger("reduced") == "toy"
    assert "toy" in how_worded("reduced") and "verified or falsified" in how_worded("full")


def test_every_claim_ends_in_words_or_says_what_it_takes(plan, tmp_path):
    write(plan, simulate(plan, others(Truth(0.55), plan)), tmp_path)
    held = json.loads((tmp_path / "claims.json").read_text())
    assert {claim["camp"] for claim in held["claims"]} == {"study", "other"}
    for claim in held["claims"]:
        assert claim["conclusion"].endswith(".") and "nan" not in claim["conclusion"]
        decided = claim["direction"] in ("for", "against")
        assert decided or claim["needs"], claim["id"]
        assert all(row["runs"] for row in claim["rows"])
    text = (tmp_path / "claims.md").read_text()
    assert all(f"## {claim['title']}: {claim['verdict']}" in text for claim in held["claims"])


def test_every_reading_that_a_claim_may_ask_for_is_there(plan):
    from costbp.config.claims import Claim
    from costbp.config.read import _models_in

    names = {
        name
        for part in _models_in(Claim)
        if "reading" in part.model_fields
        for name in part.model_fields["reading"].annotation.__args__
    }
    assert set(READINGS) == names


def test_spikes_are_beyond_ten_times_the_median_before():
    rng = np.random.default_rng(0)
    steps = pd.DataFrame({"loss": 1 + 0.0 * np.arange(300), "gradient_norm": 1.0, "derivative_rms": np.abs(rng.normal(size=300))})  # fmt: skip
    assert spikes(steps)["spikes"] == 0
    steps.loc[[100, 200], "derivative_rms"] = 50.0
    steps.loc[101:110, "loss"] = 3.0
    found = spikes(steps)
    assert found["spikes"] == 2
    assert found["spike_loss"] == pytest.approx(np.log(3) / 2)


@pytest.mark.parametrize(
    ("arrangements", "kept"),
    [
        (
            ["1 of 1 blocks kept, whole batch of 8", "6 of 6 blocks kept, 2 micro-batches of 4"],
            True,
        ),
        (["5 of 6 blocks kept, whole batch of 8", "6 of 6 blocks kept, whole batch of 8"], False),
        (["whole batch of 8"], False),
        ([""], False),
        ([None], False),
    ],
)
def test_backpropagation_that_keeps_every_block_under_its_ceiling_is_not_checkpointed(
    arrangements, kept
):
    runs = {seed: {"arrangement": text} for seed, text in enumerate(arrangements)}
    arm = Arm(Cell("m", "t", "bp_checkpointing", "b"), "BP", tuple(runs), runs, {}, None)
    assert arm.keeps_all is kept
