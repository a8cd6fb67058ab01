"""The page, its figures and the README's excerpt, on frames made by hand: what stands out, what is said
first, and that every link leads to a run."""

from __future__ import annotations

import contextlib
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from costbp.analysis import figures, readme, report
from costbp.analysis.frames import Frames
from costbp.analysis.outputs import REPORT
from costbp.analysis.panels import EMPTY
from costbp.analysis.statistics import interval
from costbp.analysis.tables import leaders, run_folder, spread, summary
from costbp.config import load_plan
from costbp.config.study import Block
from costbp.config.tuning import Trial
from costbp.errors import UserError
from costbp.files import write_json
from tests.conftest import ROOT

METHODS = ("bp_checkpointing", "bp_vanilla", "fmad_vanilla", "fmad_multiple", "zo_vanilla")
SHARES = (0, 0.01, 0.1, 0.3, 1)
ENDS = {"bp_checkpointing": 0.9, "bp_vanilla": 0.91, "fmad_vanilla": 0.6, "fmad_multiple": 0.5}
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def plan():
    with contextlib.chdir(ROOT):
        plan = load_plan()
    models = ("minilm_lora", "minilm_head")
    block = Block(models=models, tasks=("trec",), methods=METHODS, budgets=("units_400",))
    study = plan.study.model_copy(update={"experiments": (block,), "seeds": SEEDS})
    return plan.model_copy(update={"study": study})


def built(plan) -> Frames:
    """Runs whose test accuracy is one more than their last on the validation split, but for
    ``fmad_multiple``, whose test accuracy is the best of its family; ``zo_vanilla`` diverges once."""
    runs, curves, rng = [], [], np.random.default_rng(0)
    for cell in plan.cells():
        family = plan.catalog.methods[cell.method].family
        for seed in plan.seeds(cell):
            end, names = ENDS.get(cell.method, 0.55) + 0.01 * seed, cell._asdict()
            diverged = cell.method == "zo_vanilla" and seed == 2
            for share in SHARES[: 3 if diverged else None]:
                curves.append(
                    {**names, "seed": seed, "step": int(200 * share), "seconds": 40 * share}
                    | {"forward_units": 400 * share, "flops": 4e12 * share}
                    | {
                        "validation_accuracy": 0.3 + (end - 0.3) * share,
                        "validation_loss": 2 - share,
                    }
                )
            runs.append(
                {**names, "seed": seed, "family": family, "hash": f"{rng.integers(2**31):08x}"}
                | {"outcome": "diverged" if diverged else "completed", "message": "" if not diverged else "loss > 10"}
                | {"test_accuracy": 0.7 if cell.method == "fmad_multiple" else end + 0.01, "test_loss": 1.0}
                | {"best_validation_accuracy": end, "majority": 0.2, "steps": 200, "forward_units": 399.0}
                | {"flops": 4e12, "seconds": 40.0, "evaluation_seconds": 1.0, "peak_bytes": 2**20}
                | {"state_bytes": 2**10, "weights_bytes": 2**26, "rss_bytes": 2**29, "d": 1536}
                | {"optimizer": "sgd 0.001", "commit": "abc", "difference_snr": None, "finished": "2026"}
                | dict.fromkeys(("costbp", "torch", "transformers", "peft", "python", "device", "machine"), "x")
            )  # fmt: skip
    costs = [
        {"model": cell.model, "task": cell.task, "method": cell.method, "device": "cpu", "seconds": 0.1}
        | {"forward_seconds": 0.05, "forward_units": 2.0, "closed_form": 2.0, "flops": 4e9, "peak_bytes": 2**20}
        | {"state_bytes": 2**10, "predicted_bytes": None, "allocated_bytes": None, "reserved_bytes": None}
        for cell in plan.cells()
    ]  # fmt: skip
    return Frames(pd.DataFrame(runs), pd.DataFrame(curves), pd.DataFrame(costs))


def judged(name: str, verdict: str, runs: list[str], **more) -> dict:
    row = {"name": name, "side": "for", "text": "+30.1 points", "runs": runs}
    found = {
        "id": name, "title": name.capitalize(), "statement": "BP is better.", "source": "a paper",
        "provenance": "quoted", "claimed": "up to 31.1 %", "camp": "other", "reading": "accuracy_gap",
        "definition": "A minus B.", "measured": "+30.1 points", "value": 30.1, "low": 28.0, "high": 32.2,
        "unit": "points", "direction": "for", "magnitude": None, "verdict": verdict, "ledger": "toy",
        "conclusion": f"The conclusion of {name}.", "needs": "", "rows": [row] if runs else [],
        "left_out": [{"name": "one & other", "reason": "learnt nothing"}],
    }  # fmt: skip
    return found | more


@pytest.fixture(scope="module")
def page(plan, tmp_path_factory):
    """Plan, frames and folder of a page, beside a store that holds every run's folder."""
    folder = tmp_path_factory.mktemp("page")
    paths = {"store": folder / "runs", "reports": folder / "reports"}
    paths = plan.study.paths.model_copy(update=paths)
    plan = plan.model_copy(update={"study": plan.study.model_copy(update={"paths": paths})})
    frames = built(plan)
    frames.runs.loc[:9, "commit"] = "def+"
    folders = [run_folder(plan, run) for run in frames.runs.itertuples()]
    for folder in folders:
        folder.mkdir(parents=True)
    claims = [
        judged("accuracy", "holds here", [str(folder) for folder in folders[:10]]),
        judged("memory", "does not hold here", [], direction="against"),
        judged("scale", "inconclusive here", [], needs="twelve seeds"),
        judged("rates", "untuned", [], needs="snakemake tune"),
        judged("device", "not tested here", [], needs="a phone", measured="", low=None, high=None),
    ]
    write_json(paths.reports / "claims.json", {"study": plan.name, "claims": claims})
    figures.write(plan, frames, paths.reports / "figures")
    report.write(plan, frames, paths.reports)
    return plan, frames, paths.reports


def test_intervals_are_student_s():
    values = pd.Series([0.61, 0.64, 0.6, None, 0.66])
    known = values.dropna()
    expected = stats.t.interval(0.95, 3, known.mean(), stats.sem(known))
    assert interval(values)[1:] == pytest.approx(expected)
    assert interval(pd.Series([0.5])) == (0.5, 0.5, 0.5)
    assert all(np.isnan(interval(pd.Series([None], dtype=float))))
    assert spread(pd.Series([0.9, 1.0]), 100) == "95.0 (31.5-100.0)"  # of 12.7 standard errors


def test_the_best_is_chosen_by_validation_and_never_by_test(plan):
    frames = built(plan)
    test = frames.runs.groupby("method")["test_accuracy"].mean()
    assert test["fmad_multiple"] > test["fmad_vanilla"]
    methods = {cell[2] for cell in leaders(plan, frames.runs)}
    assert methods == {"bp_checkpointing", "fmad_vanilla", "zo_vanilla"}


def test_curves_start_at_step_0_and_end_where_the_first_seed_does(plan):
    frames, best = built(plan), {"bp_checkpointing", "fmad_vanilla", "zo_vanilla"}
    curves = frames.curves.assign(leads=frames.curves["method"].isin(best), majority=0.2)
    axis = figures.curve(plan, curves, "forward_units", "validation_accuracy").axes[0]
    lines = {tuple(line.get_xdata()): line for line in axis.lines if len(line.get_xdata()) > 2}
    whole, short = tuple(400 * s for s in SHARES), (0, 4, 40)
    assert set(lines) == {whole, short}
    assert axis.get_xlim()[0] < 0
    assert lines[short].get_ydata()[-1] == pytest.approx(100 * (0.3 + 0.27 * 0.1))
    grey = [line for line in axis.lines if line.get_color() == figures.GREY]
    assert [line.get_url().partition("#")[2] for line in grey] == ["BP", "FmAD-Multiple"]
    bands = [band for band in axis.collections if band.get_alpha() == 0.2]
    assert len(bands) == 3


def test_tuning_shows_every_rate_and_marks_the_chosen(plan):
    rows = [
        {"model": "minilm_lora", "task": "trec", "method": "zo_vanilla", "budget": "units_400"}
        | {"optimizer": "sgd", "lr": lr, "eps": eps, "share": 0.1, "accuracy": accuracy, "chosen": lr == 0.1}
        for lr, eps, accuracy in ((0.01, 0.1, 0.3), (0.1, 0.1, 0.5), (0.1, 0.01, 0.58), (1.0, 0.1, 0.54))
    ]  # fmt: skip
    late = [{**rows[0], "share": 1.0, "accuracy": 0.99}]  # of a later round: not the same budget
    axis = figures.tuning(plan, pd.DataFrame(late + rows)).axes[0]
    assert axis.collections[0].get_array().ravel().tolist() == pytest.approx([30, 58, 54])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["ZO-Vanilla (2/3)"]
    (dot,) = axis.lines
    assert dot.get_xdata()[0] == 1.5


def test_jumps_keep_the_largest_of_neighbours(plan, tmp_path, monkeypatch):
    frames = built(plan)
    runs = frames.runs.assign(leads=frames.runs["method"] == "zo_vanilla")
    steps = pd.DataFrame({"forward_units": np.arange(2000.0), "derivative_rms": 1.0})
    steps.loc[777, "derivative_rms"] = 50
    monkeypatch.chdir(tmp_path)
    folder = run_folder(plan, runs[runs["leads"]].iloc[0])
    folder.mkdir(parents=True)
    steps.to_parquet(folder / "steps.parquet")
    found = figures._steps(plan, runs)
    assert len(found) == figures.POINTS
    assert found.loc[found["derivative_rms"].idxmax(), "forward_units"] == 777


def test_every_link_leads_to_a_run_and_nothing_to_the_network(page):
    plan, frames, folder = page
    text = (folder / "index.html").read_text()
    targets = {unescape(t) for t in re.findall(r'(?:href|src)="([^"]*)"', text) if not t.startswith(("#", "data:"))}  # fmt: skip
    assert all((folder / target).is_dir() for target in targets)
    linked = {(folder / target).resolve() for target in targets}
    assert {run_folder(plan, run).resolve() for run in frames.runs.itertuples()} <= linked
    assert not re.search(r'<link|<script src|@import|url\((?!data:|#)["\']?http', text)
    assert len(text) < 6e6
    drawing = (folder / "figures/accuracy_units.svg").read_text()
    assert all((folder / "figures" / unescape(t).partition("#")[0]).is_dir() for t in re.findall(r'<a xlink:href="([^"]*)"', drawing))  # fmt: skip
    assert "<title>BP-Checkpointing, forward units 400, 92 (90.04-93.96)</title>" in text


def test_figures_beyond_the_room_of_a_page_are_linked(page, monkeypatch):
    folder = page[2] / "figures"
    first, second = (report.embedded(folder / f"{figure.name}.svg") for figure in REPORT[:2])
    monkeypatch.setattr(report, "ROOM", len(first) + len(second) - 1)
    found = report.pictures(REPORT[:2], folder)
    assert [drawing[:2] for _, drawing in found.values()] == ["<s", "<a"]


def test_the_page_says_the_outcome_first_and_what_is_missing(page):
    folder = page[2]
    text = (folder / "index.html").read_text()
    order = [
        "The conclusion of accuracy.",
        "28 to 32.2 points",
        "The conclusion of memory.",
        "twelve seeds",
    ]
    order += [
        "<figure",
        "4 completed, 1 diverged",
        "loss &gt; 10",
        "one &amp; other: learnt nothing",
    ]
    order += ["What was not tested", "It would take: a phone"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert (
        "2 of 50 runs ended as diverged." in text
        and "made at 2 commits of the code (abc, def+)" in text
    )
    assert "The conclusion of scale." not in text and EMPTY not in text
    for figure in REPORT:  # no trials, no derivatives: declared, and not shown
        assert (folder / f"figures/{figure.name}.svg").exists()
    assert 'id="accuracy_units"' in text and 'id="tuning"' not in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(28.0, 32.25, "28 to 32.25 x"), (8.0, None, "at least 8 x"), (None, 0.0, "at most 0 x"), (None, None, "")],
)  # fmt: skip
def test_intervals_in_words(low, high, words):
    assert report.bounds({"low": low, "high": high, "unit": "x"}) == words


def test_untuned_and_kept_runs_are_said(plan):
    frames = built(plan)
    frames.runs["tuned"] = frames.runs["method"] != "zo_vanilla"
    frames.runs["arrangement"] = np.where(frames.runs["family"] == "bp", "micro-batch 2", "")
    rows = report.settings(plan, frames)[0]["rows"].set_index("Method")
    assert rows.loc["ZO-Vanilla", "Optimiser"] == "sgd 0.001, untuned"
    assert rows["Kept by"].tolist() == ["micro-batch 2", "micro-batch 2", "-", "-", "-"]
    assert rows.loc["BP", "Forward units"] == "399"


@pytest.mark.parametrize(
    ("cell", "order"),
    [
        ("61.0 (60.0-62.0)", 61), ("1,998", 1998), ("12.5 MiB", 12.5 * 2**20), ("4 T", 4e12), ("3.21 k", 3210),
        ("-0.5", -0.5), ("≥ 8x", 8), ("-", -1), ("completed", None), ("BP", None), ("4 completed, 1 diverged", 4),
    ],
)  # fmt: skip
def test_cells_sort_by_their_number(cell, order):
    assert report.order_of(cell) == (order if order is None else pytest.approx(order))
    assert report.order_of(report.Markup("<a href='x'>{}</a>").format(cell)) == report.order_of(
        cell
    )


def test_the_readme_s_excerpt_is_that_of_the_records(page, tmp_path):
    plan, frames, folder = page
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{readme.BEGIN}\nYesterday.\n{readme.END}\n\nMore.\n")
    readme.write(plan, frames, folder, file)
    text = file.read_text()
    assert text.startswith(f"# Title\n\n{readme.BEGIN}\nStudy 'laptop' (reduced scale): 5 seeds")
    assert text.endswith(f"\n{readme.END}\n\nMore.\n") and "Yesterday" not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    of = frames.runs[
        (frames.runs["method"] == "zo_vanilla") & (frames.runs["model"] == "minilm_lora")
    ]
    assert table["ZO-Vanilla"][0] == spread(of["test_accuracy"], 100) + "*"
    assert table["a constant answer"] == ["20.0", "20.0"] and len(table) == len(METHODS) + 3
    assert all(cell.endswith(" forward units") for cell in table["budget"])
    assert "- Accuracy, holds here (toy): The conclusion of accuracy." in text
    assert "- Undecided: Scale, Rates." in text and "- Not tested here: Device." in text
    assert "Commit abc, def+, x; runs: 50," in text
    readme.write(plan, frames, folder, file)
    assert file.read_text() == text
    file.write_text("no markers")
    with pytest.raises(UserError, match=r"README\.md: no lines '<!-- results -->'"):
        readme.write(plan, frames, folder, file)


def test_the_excerpt_leaves_out_methods_of_few_settings(page):
    plan, frames, _ = page
    rare, common = "fzoo", "zo_vanilla"
    one = frames.runs[(frames.runs["method"] == common) & (frames.runs["model"] == "minilm_lora")]
    settings = [
        one.assign(method=common, budget=name) for name in ("units_400", "units_600", "units_1200")
    ]
    runs = pd.concat([*settings, settings[0].assign(method=rare)])
    labels = plan.catalog.methods
    assert list(readme.table(plan, runs)["Method"]) == [
        "budget",
        labels[common].label,
        "a constant answer",
    ]
    runs = pd.concat([runs, settings[1].assign(method=rare)])
    assert labels[rare].label in list(readme.table(plan, runs)["Method"])


def test_the_readme_has_room_for_its_excerpt():
    text = Path(ROOT / "README.md").read_text()
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1
    assert text.index(readme.BEGIN) < text.index(readme.END)


def test_trials_are_read_from_the_plan_and_one_without_accuracy_stays_empty(plan):
    cell = next(plan.cells())
    trials = [Trial(name="sgd", lr=lr, share=0.1, accuracy=score) for lr, score in ((0.1, 0.4), (1, None))]  # fmt: skip
    choice = SimpleNamespace(optimizer=trials[0])
    asked = SimpleNamespace(cells=lambda: [cell], trials=lambda _: trials, choice=lambda _: choice)
    found = figures._trials(asked)
    assert found["chosen"].tolist() == [True, False] and found["optimizer"].tolist() == ["sgd"] * 2
    axis = figures.tuning(plan, found).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["sgd 0.1", "sgd 1"]


def test_further_metrics_stand_where_runs_have_them(plan):
    frames = built(plan)
    assert "Exact match, %" not in summary(plan, frames)
    of = (frames.runs["model"] == "minilm_lora") & (frames.runs["method"] == "bp_vanilla")
    frames.runs.loc[of, "test_exact_match"] = [0.5, 0.5, 0.5, 0.5, 0.5]
    table = summary(plan, frames).set_index(["Model", "Method"])["Exact match, %"]
    assert (table != "-").sum() == 1 and "50.0 (50.0-50.0)" in set(table)
    first, second = (setting["rows"] for setting in report.settings(plan, frames))
    assert "Exact match, %" in first and "Exact match, %" not in second


def test_what_a_drawing_says_keeps_its_digits_on_the_page(tmp_path):
    file = tmp_path / "a.svg"
    file.write_text(
        '<?xml?><svg><path d="M 1.23456 7.65432"/><text x="3.14159">sgd 0.00178</text>'
        '<a xlink:href="../../runs/m#BP, loss 0.00316 (0.00271-0.00361)" target="_blank"><g/></a></svg>'
    )
    drawing = str(report.embedded(file))
    assert ">sgd 0.00178<" in drawing
    assert "<title>BP, loss 0.00316 (0.00271-0.00361)</title>" in drawing
    assert 'd="M 1.23 7.65"' in drawing and 'x="3.14"' in drawing
