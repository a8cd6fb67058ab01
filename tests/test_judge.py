"""The judge, judged: simulated studies whose truth is known."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from costbp.analysis.arms import Evidence, depth
from costbp.analysis.claims import judge
from costbp.analysis.finding import Finding, Measured
from costbp.analysis.frames import Frames
from costbp.analysis.readings import READINGS
from costbp.analysis.readings.convergence import crossing, profiles
from costbp.analysis.statistics import ALPHA, OUTSIDE, Sample, aggregate, holm, largest
from costbp.config import Cell, load_plan
from tests.conftest import ROOT
from tests.simulated import Truth, found, only, others, simulate, study

EXACT = {"step_cost", "largest_model", "none", "learns"}  # counted, or of one method alone


@pytest.fixture(scope="module")
def plan():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return study(load_plan())


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


@pytest.mark.parametrize(
    ("sign", "bound", "side"),
    [
        (1, "at_least", "for"),
        (1, "at_most", "undecided"),
        (-1, "at_most", "against"),
        (-1, "at_least", "undecided"),
    ],
)
def test_a_bound_decides_for_the_side_that_it_leans_to_alone(sign, bound, side):
    """A ratio of at most 10 may as well be 0.1."""
    finding = Finding("", "", "x")
    sample = Sample(sign * np.array([2.0, 2.1, 2.2, 2.3, 2.4]), **{bound: True})
    finding.add(Measured(sample, ""), "row", Cell("m", "t", "a", "b"), "c", [])
    assert sample.p < ALPHA and finding.sides == [side]


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
