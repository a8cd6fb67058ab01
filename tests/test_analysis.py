"""Tables, figures and words on frames made by hand."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pandas as pd
import pytest

from costbp.analysis import outputs, tables
from costbp.analysis.cost_figures import front_of
from costbp.analysis.finding import how_worded
from costbp.analysis.frames import Frames
from costbp.analysis.tables import scale_line
from costbp.config import load_plan
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
