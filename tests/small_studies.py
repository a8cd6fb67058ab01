"""Shipped studies made small: an overlay that changes sizes and nothing else, and the commands of the
workflow's rules run one after the other in this process, which starts no program a job."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from costbp.cli import app
from costbp.config import load_plan
from costbp.config.entries import short_hash
from costbp.config.study import Plan
from costbp.cost.bench import Bench
from costbp.cost.record import CostRecord
from costbp.tasks import docstrings
from tests.conftest import ROOT, working_copy
from tests.fetched import build
from tests.fetched_models import SIZES

SHIPPED = {"laptop": Path("config/config.yaml")} | {
    path.stem: path.relative_to(ROOT) for path in sorted((ROOT / "config/studies").glob("*.yaml"))
}
TASK = {"batch_size": 2, "train": 12, "validation": 4, "test": 5}
UNITS = 26  # every method takes a step: the dearest, of SVRG, is ten estimates of 2.4 units
SPENT = {"forward_units": UNITS}
ONE_STEP = {"forward_units": None, "steps": 1}
WIDE = {"peak_memory": {"inference": 20.0}}  # of small models most is not what a forward takes
SHORTER = {"source.config.num_hidden_layers": [1, 2]}
COMMAND = re.compile(r"^Shell command: (.*costbp .*)$", re.MULTILINE)


# --- what is laid over ---------------------------------------------------------------------------


def smaller(study: Path, budget: dict[str, Any]) -> dict[str, Any]:
    """What is laid over a shipped study: one seed, small models, tasks and budgets, on the CPU. Its
    models, tasks, methods and points of evaluation stay."""
    given, budgets, tasks = (
        yaml.safe_load(path.read_text())
        for path in (study, Path("config/catalog/budgets.yaml"), Path("config/catalog/tasks.yaml"))
    )
    budgets |= given.get("entries", {}).get("budgets", {})
    units = [name for name, entry in budgets.items() if "forward_units" in entry]
    found: dict[str, Any] = {
        "seeds": [0],
        "entries": {
            "models": SIZES,
            "tasks": dict.fromkeys(tasks, TASK),
            "budgets": {
                name: budget | (WIDE if "peak_memory" in budgets[name] else {}) for name in units
            },
        },
        "tuning": {"file": "absent.yaml", "first": False},
        "resources": {"gpu": 0, "methods_per_job": 8},
        "device": "cpu",
        "trace_claims": False,
    }
    if "experiments" in given:
        found["experiments"] = [
            {key: value for key, value in block.items() if key != "seeds"}
            for block in given["experiments"]
        ]
    if "costs" in given:
        found["costs"] = fewer(given["costs"])
    return found


def fewer(costs: dict[str, Any]) -> dict[str, Any]:
    """Two values of each sweep, and one card, so small that few examples fit."""
    sweeps = {
        name: {"values": SHORTER.get(sweep["key"], sweep["values"][:2])}
        for name, sweep in costs["sweeps"].items()
    }
    return {"sweeps": sweeps, "fits": {"cards": ["2GB"]}}


def lay_over(study: str, budget: dict[str, Any] = SPENT) -> tuple[Plan, list[str]]:
    """The plan of a study made small, everything it needs fetched, and the options that name it. In a
    working copy."""
    over = Path(f"{study}.small.yaml")
    over.write_text(yaml.safe_dump(smaller(SHIPPED[study], budget)))
    shipped = [] if study == "laptop" else [SHIPPED[study]]
    plan = load_plan([*shipped, over])
    assert list(plan.cells()) == list(load_plan(shipped).cells())
    build(plan)
    return plan, ["--configfile", *map(str, [*shipped, over])]


# --- the workflow ----------------------------------------------------------------------------------


@contextmanager
def shortened(folder: Path) -> Iterator[None]:
    """A working copy to be in, nothing fetched from anywhere, few docstrings read; and what is traced
    of a model is remembered, for others that differ from it by name alone."""
    plain, known = Bench.cost, {}

    def cost(self: Bench, name: str, method: Any, *shape: int, **options: Any) -> CostRecord:
        entries = self.entry.identity(), method.identity()
        names = {"model": self.name, "method": name, "task": options.pop("task", None)}
        key = short_hash([*entries, self.classes, self.device, *shape])
        if key not in known:
            known[key] = plain(self, name, method, *shape, **options)
        return known[key].model_copy(update=names)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(working_copy(folder))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(docstrings, "PER_CLASS", 30)
        patch.setattr(Bench, "cost", cost)
        patch.setattr("costbp.analysis.figures.save", coarse)
        try:
            yield
        finally:
            gc.unfreeze()


def coarse(figure: Any, path: Path) -> None:
    """A figure's file in few pixels: of hundreds of panels most time goes into the finest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=30)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


def snakemake(*words: str, code: int = 0) -> str:
    """What Snakemake says, which ends with ``code``."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *words]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_jobs(*words: str, without: tuple[str, ...] = ()) -> None:
    """Run what Snakemake would run, in its order, but for some commands."""
    begun = set()
    for line in COMMAND.findall(snakemake("-n", "-p", *words)):
        inside = itertools.dropwhile(lambda word: word != "costbp", shlex.split(line))
        command = list(itertools.takewhile(lambda word: word not in (">", "2>&1"), inside))[1:]
        if command[0] in without:
            continue
        app(command, standalone_mode=False)
        if command[0] not in begun:
            begun.add(command[0])
            gc.collect()
            gc.freeze()  # a run ends with a collection, which needn't look at what was imported
        if "--out" in command:
            assert Path(command[command.index("--out") + 1]).is_file(), command


def check_report(plan: Plan) -> None:
    """Every experiment has ended well and stands in the tables, every pair on the page."""
    reports, cells = plan.study.paths.reports, list(plan.cells())
    runs = pd.read_parquet(plan.results / "runs.parquet")
    assert len(runs) == len(cells)
    assert set(runs["outcome"]) <= {"completed", "diverged"}
    summary = pd.read_csv(reports / "tables/summary.csv")
    assert list(rows(summary, "model", "task", "method", "budget")) == [tuple(c) for c in cells]
    costs = rows(pd.read_csv(reports / "tables/cost.csv"), "model", "task", "method")
    assert sorted(costs) == sorted({cell[:3] for cell in cells})
    claims = json.loads((reports / "claims.json").read_text())["claims"]
    assert claims and all(claim["verdict"] for claim in claims)
    page = (reports / "index.html").read_text()
    for model, task in plan.pairs():
        assert escape(plan.catalog.models[model].label) in page
        assert escape(plan.catalog.tasks[task].label) in page


def rows(table: pd.DataFrame, *columns: str) -> Iterator[tuple[str, ...]]:
    """The values of some columns, row by row."""
    return table[list(columns)].itertuples(index=False, name=None)
