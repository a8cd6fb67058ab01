"""A study of which a part fails: the rest is computed and reported, and the same command mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import working_copy

SMOKE = "config/studies/smoke.yaml"
FILE = """
from pathlib import Path

from costbp.estimators.backprop import Backprop
from costbp.estimators.memory_plans import keep_all


class Breaks(Backprop):
    calls = 0

    def estimate(self, *words):
        self.calls += 1
        if self.calls > 12 and Path("broken").exists():
            raise ArithmeticError("breaks on purpose")
        return super().estimate(*words)


def build():
    return Breaks(keep_all)
"""
STUDY = {
    "study": "part",
    "seeds": [0, 1],
    "experiments": [
        {
            "models": ["tiny_head"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing", "breaks", "fmad_multiple"],
            "budgets": ["units_400"],
        },
        {
            "models": ["tiny_head"],
            "tasks": ["boolq"],
            "methods": ["bp_checkpointing", "fmad_multiple"],
            "budgets": ["units_400"],
        },
    ],
    "resources": {"methods_per_job": 3},
    "paths": {"reports": "reports"},
    "entries": {
        "tasks": {
            "boolq": {
                "data": {"kind": "local", "path": "mine"},
                "train": 40,
                "validation": 10,
                "test": 10,
                "batch_size": 8,
            }
        }
    },
}
WORDS = ("--configfile", SMOKE, "part.yaml")
ONE, TWO = ("tiny_head/docstrings/breaks/units_400", "tiny_head/boolq/bp_checkpointing/units_400")
TIMED = ("seconds_mean",)


def questions(folder: Path, *, good: bool) -> None:
    """A local data set, of which a row may have a label that is none."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [
            {"question": f"is {n} even", "passage": f"{split} {n}", "answer": ["no", "yes"][n % 2]}
            for n in range(60)
        ]
        if not good:
            rows[7]["answer"] = "perhaps"
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def study(folder: Path, *, good: bool) -> Path:
    """A working copy with the study in it."""
    working_copy(folder)
    (folder / "breaks.py").write_text(FILE)
    (folder / "part.yaml").write_text(yaml.safe_dump(STUDY))
    methods = folder / "config/catalog/methods.yaml"
    entry = {
        "label": "Breaks",
        "family": "zo",
        "estimator": {"kind": "python", "file": "breaks.py", "units": 2},
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    methods.write_text(methods.read_text() + yaml.safe_dump({"breaks": entry}))
    questions(folder / "mine", good=good)
    if not good:
        (folder / "broken").touch()
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A study whose method and whose task fail, and what Snakemake said of it."""
    folder = study(tmp_path_factory.mktemp("part"), good=False)
    return folder, run(folder, "snakemake", "--cores", "2", *WORDS)


def test_what_can_be_computed_is_reported_with_what_is_missing(failed):
    folder, done = failed
    said = done.stdout + done.stderr
    retry = f"snakemake --cores 2 {' '.join(WORDS)}"
    line = (
        "Partial report: 6 of 10 runs are missing, of 3 experiments, and the costs of "
        f"tiny_head/boolq. Mend the cause, then retry: {retry}"
    )
    assert done.returncode != 0 and f"reports/partial/index.html: {line}" in said, said
    assert not (folder / "reports/index.html").exists()
    part = folder / "reports/partial"
    page, claims = ((part / name).read_text() for name in ("index.html", "claims.md"))
    assert line in page.partition("<nav")[0] and line in claims
    assert "ArithmeticError: breaks on purpose" in page and "no record" in page
    found = json.loads((part / "claims.json").read_text())["missing"]
    cells = {"/".join(run[name] for name in ("model", "task", "method", "budget")) for run in found}
    assert len(found) == 6 and {ONE, TWO} <= cells
    summary = (part / "tables/summary.md").read_text()
    assert line in summary and summary.count("| 2 missing |") == 2
    table = pd.read_csv(part / "tables/summary.csv")
    outcomes = dict(zip(table["task"] + "/" + table["method"], table["outcome"], strict=True))
    assert outcomes == {
        "docstrings/bp_checkpointing": "completed",
        "docstrings/breaks": "failed",
        "docstrings/fmad_multiple": "completed",
        "boolq/bp_checkpointing": "2 missing",
        "boolq/fmad_multiple": "2 missing",
    }


def test_a_partial_report_never_goes_into_the_readme(failed):
    folder, _ = failed
    (folder / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    words = ["report", "--partial", "--readme", "README.md", "-c", SMOKE, "-c", "part.yaml"]
    done = run(folder, "costbp", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "never of a partial report" in done.stderr
    assert (folder / "README.md").read_text().count("\n") == 2


def test_after_mending_the_same_command_computes_what_failed(failed, tmp_path):
    folder, _ = failed
    (folder / "broken").unlink()
    questions(folder / "mine", good=True)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/docstrings/*/*/*/rec*")}
    done = run(folder, "snakemake", "--cores", "2", *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    again = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert {path.parts[-4] for path in again} == {"breaks"} and len(again) == 2
    assert (folder / "reports/index.html").exists() and not (folder / "reports/partial").exists()
    whole = study(tmp_path / "whole", good=True)
    shutil.copytree(folder / "cache/prepared", whole / "cache/prepared")
    done = run(whole, "snakemake", "--cores", "2", "--until", "tables", "--configfile", *WORDS[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (pd.read_csv(at / "reports/tables/summary.csv") for at in (folder, whole))
    pd.testing.assert_frame_equal(one.drop(columns=[*TIMED]), two.drop(columns=[*TIMED]))
