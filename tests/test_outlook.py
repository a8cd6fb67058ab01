"""What a study is said to take, against a trace; and the studies of the repository."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from costbp.config import load_plan
from costbp.config.catalog import BudgetEntry, HubData
from costbp.config.load import overlaid
from costbp.cost.bench import Bench
from costbp.cost.outlook import GPU_PROCESS_MB, PROCESS_MB, Known, outlook, outlook_lines
from costbp.data.pairs import check_pairs
from costbp.errors import UserError
from tests.conftest import ROOT

STUDIES = sorted((ROOT / "config/studies").glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_home():
    with contextlib.chdir(ROOT):
        yield


def of(models, tasks, methods, budget: BudgetEntry, seeds=(0, 1)):
    plan = load_plan()
    block = plan.study.experiments[0].model_copy(
        update={
            "models": models,
            "tasks": tasks,
            "methods": methods,
            "budgets": ("b",),
            "seeds": seeds,
        }
    )
    return plan.model_copy(
        update={
            "study": plan.study.model_copy(update={"experiments": (block,)}),
            "catalog": plan.catalog.model_copy(update={"budgets": {"b": budget}}),
        }
    )


@pytest.mark.parametrize(
    ("model", "task", "classes"),
    [("bert_base", "agnews", 4), ("roberta_base", "boolq", 2), ("qwen2_vl_2b", "vqav2", 0)],
)
def test_flops_of_a_budget_are_those_of_a_trace(model, task, classes):
    plan = of(
        (model,), (task,), ("bp_vanilla", "zo_vanilla"), BudgetEntry(label="b", forward_units=10)
    )
    entry = plan.catalog.tasks[task]
    bench = Bench(plan.catalog.models[model], classes=classes or 4)
    method = plan.catalog.methods["bp_vanilla"]
    cost = bench.cost("bp_vanilla", method, entry.batch_size, entry.max_length)
    found = outlook(plan)
    assert found.runs == 4
    # the trace's image has 18 patches a side at this length, the estimate's as many as image_side
    close = 0.15 if model == "qwen2_vl_2b" else 1e-3
    assert found.flops == pytest.approx(4 * 10 * cost.forward_flops, rel=close)
    steps = of((model,), (task,), ("bp_vanilla",), BudgetEntry(label="b", steps=7), (0,))
    assert outlook(steps).flops == pytest.approx(7 * cost.flops, rel=close)


def test_what_is_not_known_is_said():
    plan = of(
        ("minilm_lora", "bert_base"), ("agnews",), ("bp_vanilla",), BudgetEntry(label="b", steps=1)
    )
    assert outlook(plan).unknown == ("minilm_lora",)
    (line,) = outlook_lines(plan)
    assert line.endswith("; minilm_lora not counted")
    none = of(("minilm_lora",), ("trec",), ("bp_vanilla",), BudgetEntry(label="b", steps=1))
    assert outlook_lines(none) == []
    found = outlook(plan)
    assert found.hours(2 * found.flops / 3600 / 1e12) == pytest.approx(0.5)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_is_valid(path):
    plan = check_pairs(load_plan([path.relative_to(ROOT)]))
    assert plan.runs > 0
    assert plan.study.paths.reports.name == plan.name or path.stem == "laptop"


def test_a_chunked_loss_is_for_costs_alone():
    plan = load_plan([ROOT / "config/studies/paper.yaml"])
    entry = overlaid(plan.catalog.models["llama_3_1_8b"], {"source.loss_chunk": 64}, "test")
    plan.catalog.models["llama_3_1_8b"] = entry
    with pytest.raises(UserError, match=r"source\.loss_chunk serves `costbp cost` alone"):
        check_pairs(plan)


def test_the_papers_study_is_whole():
    plan = load_plan([ROOT / "config/studies/paper.yaml"])
    pairs, methods = plan.pairs(), {cell.method for cell in plan.cells()}
    assert len({model for model, _ in pairs}) == 9 and len({task for _, task in pairs}) == 7
    assert len(methods) == 15 and all(len(of_pair) == 15 for of_pair in pairs.values())
    assert len(plan.assets()) == 16


def test_what_a_gpu_studys_jobs_ask_for(workdir):
    """Training takes a GPU, tracing and encoding none; encoding gets the study's memory and time."""
    for file in Path("workflow/rules").glob("*.smk"):  # without a rule's words Snakemake tells all
        file.write_text(re.sub(r'    message:\n        ".*"\n', "", file.read_text()))
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1"]
    study = ["--configfile", "config/studies/gpu-demo.yaml"]
    told = subprocess.run([*command, *study], capture_output=True, text=True, check=True)
    asked: dict[str, set[str]] = {}
    for rule, resources in re.findall(r"rule (\w+):.*?resources: ([^\n]+)", told.stdout, re.DOTALL):
        asked.setdefault(rule, set()).add(resources)
    (train,), (cost,), (encode,) = asked["train"], asked["cost"], asked["prepare"]
    assert "gpu=1" in train and "gpu=0" in cost and "gpu" not in encode
    for ask in (train, cost, encode):
        assert "mem_mb=8000" in ask and "runtime=60" in ask


def resources(plan, **values):
    changed = plan.study.resources.model_copy(update=values)
    return Known(
        plan.model_copy(update={"study": plan.study.model_copy(update={"resources": changed})})
    )


@pytest.mark.parametrize("model, task", [("roberta_large", "boolq"), ("opt_6_7b", "agnews")])
def test_memory_that_a_job_asks_for_holds_the_weights_file(model, task):
    """As a trace counts the parameters, to a twentieth."""
    plan = load_plan([Path("config/studies/paper.yaml")])
    entry = plan.catalog.models[model]
    size = 4 if entry.source.dtype == "float32" else 2
    known = Known(plan)
    weights = known.mem_mb(1, model, task) - GPU_PROCESS_MB
    assert weights == pytest.approx(Bench(entry).parameters * size / 1e6, rel=0.05)
    on_cpu = resources(plan, gpu=0).mem_mb(1, model, task)
    assert on_cpu == pytest.approx(PROCESS_MB + weights, abs=1)
    assert known.mem_mb(1) == PROCESS_MB, "a trace reads no weights"


def test_time_that_a_job_asks_for_follows_its_flops():
    plan = load_plan([Path("config/studies/paper.yaml")])
    known, cells = Known(plan), list(plan.cells())[:2]
    hour = known.runtime(1)
    flops = sum(known.flops(cell) for cell in cells)
    assert flops == pytest.approx(sum(3 * 20_000 for _ in cells) * _forward(known, cells[0]))
    assert known.runtime(1, cells) == pytest.approx(hour + 2 * flops / 1e14 / 60, abs=1)
    assert resources(plan, tflops=10).runtime(1, cells) > 3 * hour
    trials = known.runtime(1, cells, trials=True) - hour
    assert trials == pytest.approx(4 / 3 * (known.runtime(1, cells) - hour), abs=2)
    assert resources(plan, gpu=0).runtime(1, cells) == hour, "a CPU's TFLOP/s are not known"


def _forward(known, cell):
    return sum(product.flops for product in known.products(cell.model, cell.task))


def test_each_attempt_asks_for_more_and_what_a_study_says_goes_first():
    plan = load_plan([Path("config/studies/paper.yaml")])
    pair, cells = ("opt_13b", "boolq"), list(plan.cells())[:1]
    said = resources(plan, mem_mb=1000, runtime=10)
    assert [said.mem_mb(n, *pair) for n in (1, 2, 3)] == [1000, 1500, 2250]
    assert [said.runtime(n, cells) for n in (1, 2, 3)] == [10, 15, 23]
    flat = resources(plan, growth=1.0)
    assert flat.mem_mb(3, *pair) == flat.mem_mb(1, *pair) == Known(plan).mem_mb(1, *pair)
    default = load_plan()  # its models are not given by configurations
    model, task, *_ = cell = next(default.cells())
    assert (Known(default).mem_mb(1, model, task), Known(default).runtime(1, [cell])) == (2500, 60)


def test_every_data_set_of_the_hub_is_pinned():
    tasks = load_plan().catalog.tasks
    pins = {name: t.data.revision for name, t in tasks.items() if isinstance(t.data, HubData)}
    assert {"vqav2", "textvqa"} < set(pins)
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in pins.values()), pins
