"""The judge, judged: simulated studies whose truth is known, and every bad input."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from costbp.analysis.arms import Arm, Evidence, depth
from costbp.analysis.claims import judge, page, warnings, write
from costbp.analysis.finding import Finding, Row, how_worded
from costbp.analysis.frames import Frames, spikes
from costbp.analysis.readings import READINGS
from costbp.analysis.readings.convergence import crossing, profiles
from costbp.analysis.statistics import ALPHA, OUTSIDE, Sample, aggregate, holm, largest
from costbp.config import Cell, load_plan
from costbp.config.claims import Magnitude
from tests.conftest import ROOT
from tests.simulated import SEEDS, Truth, simulate, study

EXACT = {"step_cost", "largest_model", "none", "learns"}  # counted, or of one method alone


@pytest.fixture(scope="module")
def plan():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return study(load_plan())


def found(plan, frames, traces=None) -> dict[str, dict]:
    return {claim["id"]: claim for claim in judge(Evidence(plan, frames, traces or {}))}


def only(plan, *names, **update):
    """A plan with some claims alone, one of which may be changed."""
    claims = {name: plan.claims[name].model_copy(update=update) for name in names}
    return plan.model_copy(update={"claims": claims})


def others(truth: Truth, plan) -> dict[str, Truth]:
    methods = plan.catalog.methods
    return {name: truth for name, entry in methods.items() if entry.family != "bp"}


# --- statistics ------------------------------------------------------------------------------------


def test_paired_differences_are_student_s(plan):
    values = np.array([0.031, 0.012, 0.044, 0.02, 0.008])
    reference = stats.ttest_1samp(values, 0)
    sample = Sample(values)
    assert sample.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(1 - OUTSIDE)
    assert sample.interval() == pytest.approx((interval.low, interval.high))


def test_intervals_cover_with_five_seeds():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.1, 0.02, (2000, 5))
    inside = [low <= 0.1 <= high for low, high in (Sample(v).interval() for v in drawn)]
    assert 0.94 <= np.mean(inside) <= 0.96
    rows = rng.normal(0.1, 0.05, (300, 14))
    ends = [aggregate(list(row))[1:] for row in rows]
    assert 0.88 <= np.mean([low <= 0.1 <= high for low, high in ends]) <= 0.98


def test_the_largest_is_bounded_after_the_choice():
    rng = np.random.default_rng(1)
    misses = 0
    for drawn in rng.normal(0, 0.02, (400, 14, 5)) + 0.1:
        _, low, high = largest([Sample(values) for values in drawn])
        misses += not low <= 0.1 <= high
    assert misses / 400 <= OUTSIDE


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_the_number_of_seeds_asked_for_is_enough():
    values = np.array([0.03, -0.01, 0.02, 0.01, -0.005])
    count = int(Sample(values).seeds_needed())
    rng = np.random.default_rng(2)
    drawn = rng.normal(values.mean(), values.std(ddof=1), (1000, count))
    assert np.mean([Sample(row).p < ALPHA for row in drawn]) == pytest.approx(0.9, abs=0.04)


# --- under the null, and with planted effects --------------------------------------------------------


@pytest.mark.timeout(900)  # twenty seconds where the machine is idle
def test_under_the_null_hardly_anything_is_decided(plan):
    decided, studies = Counter(), 0
    for seed in range(500):
        claims = judge(Evidence(plan, simulate(plan, seed=seed)))
        names = [c["id"] for c in claims if c["direction"] in ("for", "against")]
        decided.update(names)
        studies += bool(names)
    assert not decided or max(decided.values()) / 500 <= 0.05  # of any one claim
    assert studies / 500 <= 0.05  # of all claims of a study together


@pytest.mark.parametrize(
    ("gap", "points", "percent"),
    [
        (0.311, "undecided", "reached"),
        (0.36, "reached", "reached"),
        (0.17, "not reached", "undecided"),
    ],
)
def test_a_planted_gap_is_found_and_sized(plan, gap, points, percent):
    plan = only(plan, "accuracy")
    truth = {"bp_checkpointing": Truth(0.85)} | others(Truth(0.85 - gap), plan)
    directions, sizes = Counter(), Counter()
    for seed in range(40):
        evidence = Evidence(plan, simulate(plan, truth, seed=seed))
        finding = READINGS["accuracy_gap"](evidence, plan.claims["accuracy"])
        directions[finding.direction] += 1
        sizes["points", finding.size("points")] += 1
        sizes["percent", finding.size("percent")] += 1
    assert directions["for"] >= 36
    assert sizes["points", points] >= 36
    if percent != "undecided":
        assert sizes["percent", percent] >= 36


def test_a_planted_slowness_is_found_and_sized(plan):
    plan = only(plan, "compute")
    tally = Counter()
    for seed in range(40):
        frames = simulate(plan, others(Truth(pace=150 * 6), plan), seed=seed, noise=0.004)
        claim = found(plan, frames)["compute"]
        tally[claim["direction"]] += 1
        tally[claim["magnitude"]] += 1
    assert tally["for"] >= 36 and tally["reached"] >= 36


def test_a_gap_of_noise_is_never_verified(plan):
    """What a rule of seeds that don't overlap would call verified: a gap of one point."""
    truth = {"bp_checkpointing": Truth(0.71)}
    frames = simulate(plan, truth, own=0.0002, shared=0.0, noise=0.001)
    claim = found(plan, frames)["accuracy"]
    assert claim["direction"] == "for" and claim["magnitude"] == "not reached"
    assert claim["ledger"] == "inconclusive"
    assert "not reaching the claimed 31.1 points" in claim["conclusion"]
    assert claim["needs"].startswith("for its size")


def test_scale_is_the_slope_of_one_thing(plan):
    truth = others(Truth({"minilm_words_r32": 0.55}), plan)
    claim = found(only(plan, "scale"), simulate(plan, truth))["scale"]
    assert claim["direction"] == "for"
    tenfold = 15 / np.log10(49_152 / 1_536)
    assert claim["value"] == pytest.approx(tenfold, abs=2)
    assert {row["model"] for row in claim["rows"]} == {"minilm_words to minilm_words_r32"}


@pytest.mark.parametrize(("factor", "direction"), [(1.1, "for"), (8, "against")])
def test_the_exponent_of_d(plan, factor, direction):
    """Slow-downs that hardly grow, and that grow as d does."""
    plan = only(plan, "effective_rank")
    small, large = (
        simulate(plan, others(Truth(pace=150 * k), plan), noise=0.003) for k in (1.5, 1.5 * factor)
    )
    late = [f["model"].eq("minilm_words_r32") for f in (small.curves, large.curves)]
    curves = pd.concat([small.curves[~late[0]], large.curves[late[1]]])
    claim = found(plan, Frames(small.runs, curves, small.costs))["effective_rank"]
    assert claim["direction"] == direction
    exponent = np.log(factor) / np.log(49_152 / 1_536)
    assert claim["value"] == pytest.approx(1 - exponent, abs=0.15)


def test_rankings_flip_only_where_both_orders_are_decided(plan):
    plan = only(plan, "alignment")
    flips = {"fmad_multiple": Truth({"minilm_words": 0.8, "minilm_random": 0.6})}
    flips["zo_multiple"] = Truth({"minilm_words": 0.6, "minilm_random": 0.8})
    sides = {
        row["name"]: row["side"] for row in found(plan, simulate(plan, flips))["alignment"]["rows"]
    }
    assert sides.pop("FmAD-Multiple and ZO-Multiple, trec/units_4k") == "for"
    assert found(plan, simulate(plan))["alignment"]["direction"] == "undecided"


# --- targets ---------------------------------------------------------------------------------------


def test_a_crossing_is_where_the_curve_is_between_evaluations():
    x, y = np.array([0.0, 10, 20, 30]), np.array([0.1, 0.2, 0.6, 0.5])
    assert crossing(x, y, 0.4) == (pytest.approx(15), False, False)
    assert crossing(x, y, 0.7) == (30, True, False)  # never: a bound
    assert crossing(x, y, 0.15) == (10, False, True)  # before the first evaluation: a bound
    log = np.array([0.0, 1, 2, 4, 8, 16, 32])
    rising = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert crossing(log, rising, 0.45).value == pytest.approx(np.sqrt(4 * 8))


def test_what_is_never_reached_is_a_bound_and_counts(plan):
    truth = {"bp_checkpointing": Truth(0.85)} | others(Truth(0.6), plan)
    claim = found(only(plan, "compute"), simulate(plan, truth))["compute"]
    assert claim["verdict"] == "holds here" and claim["high"] is None
    assert all(">=" in row["text"] and row["high"] is None for row in claim["rows"])
    assert claim["measured"].split(" to ")[1].startswith("at least")
    reverse = others(Truth(0.85), plan) | {"bp_checkpointing": Truth(0.6, pace=3000)}
    assert (
        found(only(plan, "compute"), simulate(plan, reverse))["compute"]["direction"] == "against"
    )


def test_time_is_not_judged_where_checkpointing_recomputes_nothing(plan):
    frames = simulate(plan, others(Truth(0.55), plan))
    names = [(model, task, "minilm" in model) for model, task in plan.pairs()]
    costs = [
        {"model": model, "task": task, "method": method, "flops": 2e9, "seq": 8}
        for model, task, _ in names
        for method in ("bp_vanilla", "bp_checkpointing")
    ]
    table = pd.DataFrame(costs)
    claim = found(only(plan, "convergence"), dataclasses.replace(frames, costs=table))[
        "convergence"
    ]
    assert claim["verdict"] == "not tested here" and "plain BP" in claim["left_out"][0]["reason"]
    assert "minilm_lora" in claim["needs"]
    table.loc[table["method"] == "bp_checkpointing", "flops"] = 3e9
    assert found(only(plan, "convergence"), dataclasses.replace(frames, costs=table))[
        "convergence"
    ]["rows"]


def test_depth_is_what_is_left_side_by_side(plan):
    methods = plan.catalog.methods
    assert [depth(methods[n]) for n in ("bp_vanilla", "bp_checkpointing", "bp_accumulate")] == [
        2,
        3,
        2,
    ]
    assert [depth(methods[n]) for n in ("fmad_multiple", "zo_multiple", "zo_svrg", "hizoo")] == [
        2,
        1,
        1,
        1,
    ]
    assert depth(methods["zo_adaptive"]) == pytest.approx(1.02)


def test_profiles_are_shares_of_problems_within_a_factor(plan):
    truth = others(Truth(pace=450), plan) | {"zo_vanilla": Truth(0.42)}
    table = profiles(plan, simulate(plan, truth, noise=0.003))
    best = table[table["method"] == "bp_checkpointing"]
    assert best["solved"].max() == 1 and best["factor"].min() == 1
    assert "zo_vanilla" not in set(table["method"])  # it never reaches the target
    slow = table[table["method"] == "zo_multiple"]
    assert slow["factor"].median() == pytest.approx(3, rel=0.2)


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
    assert [row["side"] for row in device["rows"]] == ["for", *["against"] * 4]  # equal: not larger
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
