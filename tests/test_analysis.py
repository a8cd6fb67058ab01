"""Readings and verdicts on frames made by hand, with answers known in advance."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import get_args

import pandas as pd
import pytest

from costbp.analysis import outputs, readings, tables
from costbp.analysis.cost_figures import front_of
from costbp.analysis.finding import Finding, how_worded, ledger_word
from costbp.analysis.frames import Frames, at_units, first_reach
from costbp.analysis.tables import scale_line
from costbp.config import load_plan
from costbp.config.claims import MemoryClaim, ReferenceClaim, VariantClaim
from tests.conftest import ROOT

CELL = {"model": "minilm_lora", "task": "trec", "budget": "units_400"}


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_plan()


def frames(accuracies: dict[str, list[float]], ends: dict[str, float]) -> Frames:
    """Runs whose validation accuracy rises linearly from 0.2 at 0 to the end at 400 units."""
    families = {"bp_checkpointing": "bp", "fmad_vanilla": "fmad", "zo_vanilla": "zo"}
    runs, curves = [], []
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            names = {**CELL, "method": method, "seed": seed}
            runs.append(
                {**names, "family": families[method], "test_accuracy": accuracy, "majority": 0.2}
                | {"outcome": "completed"}
            )
            for share in (0.0, 0.5, 1.0):
                curves.append(
                    {
                        **names,
                        "step": int(200 * share),
                        "forward_units": 400 * share,
                        "flops": 4e12 * share,
                        "seconds": 40 * share,
                        "validation_accuracy": 0.2 + (ends[method] - 0.2) * share,
                    }
                )
    return Frames(pd.DataFrame(runs), pd.DataFrame(curves), pd.DataFrame())


def claim(plan, name):
    return plan.claims[name]


def test_accuracy_gap(plan):
    data = frames(
        {"bp_checkpointing": [0.9, 0.88], "fmad_vanilla": [0.4, 0.5], "zo_vanilla": [0.89, 0.3]},
        {"bp_checkpointing": 0.9, "fmad_vanilla": 0.5, "zo_vanilla": 0.5},
    )
    reading = readings.accuracy_gap(plan, data, claim(plan, "accuracy"))
    assert reading.value == pytest.approx(44.0)
    assert len(reading.supporting) == 1 and "fmad_vanilla" in reading.supporting[0]
    assert len(reading.undecided) == 1 and "zo_vanilla" in reading.undecided[0]


def test_a_gap_between_methods_that_learnt_nothing_is_undecided(plan):
    accuracies = {
        "bp_checkpointing": [0.24, 0.23],
        "fmad_vanilla": [0.1, 0.1],
        "zo_vanilla": [0.3, 0.4],
    }
    data = frames(accuracies, dict.fromkeys(accuracies, 0.25))
    reading = readings.accuracy_gap(plan, data, claim(plan, "accuracy"))
    assert len(reading.undecided) == 1 and "fmad_vanilla" in reading.undecided[0]
    assert "neither left the majority class" in reading.undecided[0]
    assert len(reading.opposing) == 1 and "zo_vanilla" in reading.opposing[0]


def test_accuracy_gap_against_the_study(plan):
    data = frames(
        {"bp_checkpointing": [0.5, 0.5], "fmad_vanilla": [0.8, 0.9]},
        {"bp_checkpointing": 0.5, "fmad_vanilla": 0.8},
    )
    reading = readings.accuracy_gap(plan, data, claim(plan, "accuracy"))
    assert reading.verdict == "does not hold here"
    assert ledger_word(reading.verdict, "full") == "falsified"
    assert ledger_word(reading.verdict, "reduced") == "toy"


def test_time_and_flops_to_the_same_accuracy(plan):
    data = frames(
        {"bp_checkpointing": [0.9], "fmad_vanilla": [0.4]},
        {"bp_checkpointing": 0.9, "fmad_vanilla": 0.4},
    )
    # the reference passes 0.4 after 2/7 of its budget
    flops = readings.flops_to_same_accuracy(plan, data, claim(plan, "compute"))
    assert flops.value == pytest.approx(3.5)
    seconds = readings.time_to_same_accuracy(plan, data, claim(plan, "convergence"))
    assert seconds.value == pytest.approx(100 * (1 - 2 / 7))
    assert seconds.verdict == "holds here"


def test_variants_against_their_baselines(plan):
    data = frames(
        {"bp_checkpointing": [0.9], "fmad_vanilla": [0.4, 0.5], "zo_vanilla": [0.6, 0.7]},
        {"bp_checkpointing": 0.9, "fmad_vanilla": 0.5, "zo_vanilla": 0.5},
    )
    entry = claim(plan, "variance_reduction").model_copy(
        update={"baselines": {"zo_vanilla": "fmad_vanilla", "zo_sparse": "zo_vanilla"}}
    )
    reading = readings.beats_its_baseline(plan, data, entry)
    assert reading.value == pytest.approx(20)
    assert len(reading.supporting) == 1 and not reading.opposing and not reading.undecided


def test_the_gap_is_taken_where_all_runs_have_been(plan):
    small = frames(
        {"bp_checkpointing": [0.9], "fmad_vanilla": [0.8]},
        {"bp_checkpointing": 0.8, "fmad_vanilla": 0.6},
    )
    large = frames(
        {"bp_checkpointing": [0.9], "fmad_vanilla": [0.3]},
        {"bp_checkpointing": 0.8, "fmad_vanilla": 0.2},
    )
    parts = {"minilm_head": (small, 10), "minilm_lora": (large, 99)}
    runs = pd.concat([f.runs.assign(model=m, d=d) for m, (f, d) in parts.items()])
    curves = pd.concat([f.curves.assign(model=m) for m, (f, _) in parts.items()])
    # the large FmAD run ends early, at 200 of 400 units
    late = (curves["model"] == "minilm_lora") & (curves["method"] == "fmad_vanilla")
    data = Frames(runs, curves[~(late & (curves["forward_units"] > 200))], pd.DataFrame())
    reading = readings.gap_grows_with_d(plan, data, claim(plan, "scale"))
    assert reading.supporting == ["fmad_vanilla on trec: 10.0 -> 30.0 points at 200 units"]
    assert "minilm_head and minilm_lora share one base: d is varied" in reading.definition
    names = {"minilm_head": "roberta_base", "minilm_lora": "opt_13b"}
    data.runs["model"], data.curves["model"] = (f["model"].map(names) for f in (runs, data.curves))
    other = readings.gap_grows_with_d(plan, data, claim(plan, "scale"))
    assert "opt_13b have different bases: more than d is varied" in other.definition
    assert reading.value == pytest.approx(20)


def test_cost_readings_compare_models_that_run_their_encoder(plan):
    rows = [
        ("minilm_lora", "bp_checkpointing", 300, 20, 32),
        ("minilm_lora", "bp_vanilla", 200, 90, 32),
        ("minilm_lora", "fmad_vanilla", 200, 40, 32),
        ("minilm_lora", "zo_multiple", 1600, 5, 32),
        ("minilm_head", "bp_checkpointing", 1, 1, 0),
        ("minilm_head", "zo_multiple", 8, 9, 0),
    ]
    costs = pd.DataFrame(rows, columns=["model", "method", "flops", "peak_bytes", "seq"])
    data = Frames(pd.DataFrame(), pd.DataFrame(), costs.assign(task="trec", state_bytes=0))
    flops = readings.flops_per_step(plan, data, claim(plan, "compute_per_step"))
    assert flops.value == pytest.approx(1600 / 300)
    assert flops.measured == "0.67x to 5.33x"
    assert [len(flops.supporting), len(flops.opposing)] == [1, 1]
    memory = readings.memory_comparable(plan, data, claim(plan, "memory"))
    assert memory.value == pytest.approx(4)  # tolerance 1.5
    assert "fmad_vanilla" in memory.supporting[0] and "zo_multiple" in memory.opposing[0]
    least = readings.zo_needs_least_memory(plan, data, claim(plan, "mezo_checkpoint"))
    assert least.measured == "BP-Checkpointing needs 4.00x to 4.00x"
    assert least.verdict == "holds here"


def test_a_method_that_learnt_nothing_settles_nothing(plan):
    data = frames(
        {"bp_checkpointing": [0.9], "fmad_vanilla": [0.2]},
        {"bp_checkpointing": 0.9, "fmad_vanilla": 0.22},
    )
    reading = readings.flops_to_same_accuracy(plan, data, claim(plan, "compute"))
    assert reading.value is None
    assert reading.verdict == "inconclusive here"


def test_a_reference_that_never_gets_there_counts_against(plan):
    data = frames(
        {"bp_checkpointing": [0.3], "fmad_vanilla": [0.8]},
        {"bp_checkpointing": 0.3, "fmad_vanilla": 0.8},
    )
    reading = readings.flops_to_same_accuracy(plan, data, claim(plan, "compute"))
    assert len(reading.opposing) == 1
    assert reading.verdict == "does not hold here"


@pytest.mark.parametrize(
    ("supporting", "opposing", "undecided", "verdict"),
    [
        (3, 0, 0, "holds here"),
        (3, 1, 0, "holds here"),
        (2, 1, 0, "inconclusive here"),
        (1, 3, 0, "does not hold here"),
        (1, 0, 2, "inconclusive here"),
        (0, 0, 0, "inconclusive here"),
    ],
)
def test_verdicts_follow_from_counts(supporting, opposing, undecided, verdict):
    reading = Finding("", "", None, ["+"] * supporting, ["-"] * opposing, ["?"] * undecided)
    assert reading.verdict == verdict


def test_first_reach_is_linear_between_evaluations_and_censored():
    curve = pd.DataFrame(
        {"step": [0, 1, 2], "flops": [0, 10, 20], "validation_accuracy": [0.1, 0.5, 0.4]}
    )
    assert first_reach(curve, 0.3, "flops") == pytest.approx(5)
    assert first_reach(curve, 0.05, "flops") == 0
    assert first_reach(curve, 0.6, "flops") is None


def test_accuracy_at_units(plan):
    data = frames({"bp_checkpointing": [0.9]}, {"bp_checkpointing": 0.6})
    assert at_units(data.curves, 100)["accuracy"].tolist() == pytest.approx([0.3])
    assert at_units(data.curves, 1e9)["accuracy"].tolist() == pytest.approx([0.6])
    assert at_units(data.curves[data.curves["step"] > 0], 100).empty


def test_every_reading_that_a_claim_may_ask_for_is_there():
    parts = (ReferenceClaim, MemoryClaim, VariantClaim)
    allowed = {name for part in parts for name in get_args(part.model_fields["reading"].annotation)}
    assert set(readings.READINGS) == allowed


def test_words():
    assert tables.si(3.21e12) == "3.21 T"
    assert tables.mib(5 * 2**20) == "5.0 MiB"
    assert tables.spread(pd.Series([0.5, None]), 100) == "50.0"
    assert tables.spread(pd.Series([None], dtype=float)) == "-"
    assert r"\%" in tables.latex(pd.DataFrame({"a": ["1 %"], "b": [1], "c": [1], "d": [1]}), "x")


def test_the_pareto_front_holds_what_nothing_beats():
    rows = pd.DataFrame(
        {"beyond": [10, 20, 30, 40, 5], "forward_units": [3.0, 2.0, 1.99, 1.0, 9.0]},
        index=["a", "b", "equal", "c", "d"],
    )
    assert front_of(rows).index.tolist() == ["d", "a", "b", "c"]
    rows.loc["beaten"] = [25, 2.5]
    assert front_of(rows).index.tolist() == ["d", "a", "b", "c"]


def test_every_figure_has_its_drawing_and_naming_them_is_quick():
    for figure in (*outputs.REPORT, *outputs.COSTS):
        module, function = figure.by.split(".")
        assert callable(getattr(import_module(f"costbp.analysis.{module}"), function))
    script = "import sys, costbp.analysis.outputs as o; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_caption_speaks_of_intervals_where_there_are_some():
    figure = outputs.REPORT[0]
    assert "bands are their 95 % intervals" in figure.words(3) and "intervals" not in figure.words(
        1
    )


def test_the_verdicts_are_worded_by_the_study_s_scale(plan):
    assert "toy" in how_worded("reduced") and "verified or falsified" in how_worded("full")
    assert "3 or 2 seeds" not in scale_line(plan) and "interval over seeds" in scale_line(plan)
    single = plan.study.model_copy(
        update={"seeds": (0,), "experiments": plan.study.experiments[:1]}
    )
    line = scale_line(plan.model_copy(update={"study": single}))
    assert "1 seed, budget of" in line and "interval" not in line
