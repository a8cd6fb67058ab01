"""The smoke study through a real Slurm of one node: same tables, GPU asked for, failures retried."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import working_copy
from tests.slurm import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

if not os.environ.get("CI"):
    pytest.skip("starts a Slurm cluster for three minutes: set CI=1", allow_module_level=True)
pytest.importorskip("snakemake_executor_plugin_slurm")
if reason := cluster.missing():
    pytest.skip(reason, allow_module_level=True)

# Laid over the smoke study: half of its runs.
STUDY = {
    "experiments": [
        {
            "models": ["tiny_lora"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing"],
            "budgets": ["units_96"],
        },
        {
            "models": ["tiny_head"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing", "fmad_multiple"],
            "budgets": ["units_400"],
        },
    ],
    "device": "cpu",  # the GPU exists in Slurm's books only
}
ON_GPU = {"resources": {"methods_per_job": 1, "gpu": 1, "mem_mb": 600, "runtime": 10}}

# Figures that may not depend on where a job ran; seconds may.
COLUMNS = [
    "model",
    "task",
    "method",
    "budget",
    "test_accuracy_mean",
    "steps",
    "forward_units",
]

FLAKY = """\
rule flaky:
    output:
        "done",
    shell:
        "if [ -e tried ]; then touch {output}; else touch tried; exit 3; fi"
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster: where it lives, and the environment of its commands."""

    folder: Path
    environment: dict[str, str]

    def submissions(self) -> list[str]:
        """Arguments of every sbatch so far."""
        return cluster.calls(self.folder, "sbatch")

    def states(self, workdir: Path) -> list[str]:
        """How each job submitted from a folder ended, in order of submission."""
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--sort=i", "--format=%T %Z"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        lines = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        return [state for state, folder in lines if folder == str(workdir)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One cluster for the module."""
    folder = tmp_path_factory.mktemp("slurm")
    with cluster.one_node_slurm(folder, gpus=1) as environment:
        yield Slurm(folder, environment)


def snakemake(workdir: Path, environment: dict[str, str], *words: str) -> str:
    """Run Snakemake in a folder; returns what it printed, and fails with it."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=workdir,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def on_slurm(workdir: Path, slurm: Slurm, *words: str) -> str:
    """Run Snakemake with the profile that clusters use, asking for news more often."""
    profile = ("--profile", "workflow/profiles/slurm", "--jobs", "2")
    often = ("--slurm-init-seconds-before-status-checks", "4")
    return snakemake(workdir, slurm.environment, *profile, *often, *words)


def summary(workdir: Path) -> pd.DataFrame:
    """The figures of the summary that must not depend on where the jobs ran."""
    table = pd.read_csv(workdir / "reports" / "smoke" / "tables" / "summary.csv")
    return table[COLUMNS].sort_values(["model", "method"], ignore_index=True)


def test_smoke_study_gives_the_same_tables_as_a_local_run(tmp_path: Path, slurm: Slurm) -> None:
    local, remote = working_copy(tmp_path / "local"), working_copy(tmp_path / "remote")
    study = ["--configfile", "config/studies/smoke.yaml", "overlay.yaml"]
    (local / "overlay.yaml").write_text(yaml.safe_dump(STUDY))
    (remote / "overlay.yaml").write_text(yaml.safe_dump(STUDY | ON_GPU))
    before = len(slurm.submissions())

    snakemake(local, dict(os.environ), "--cores", "2", *study)
    assert len(slurm.submissions()) == before, "the default profile stays local"
    on_slurm(remote, slurm, *study)

    pd.testing.assert_frame_equal(summary(local), summary(remote), check_exact=True)
    assert len(summary(remote)) == 3

    # prepare and cost of two pairs, and three experiments; the rest runs where Snakemake runs
    assert slurm.states(remote) == ["COMPLETED"] * 7
    submitted = slurm.submissions()[before:]
    rules = [call.partition("--allowed-rules ")[2].split()[0] for call in submitted]
    assert Counter(rules) == {"prepare": 2, "cost": 2, "train": 1, "train_head": 2}
    for rule, call in zip(rules, submitted, strict=True):
        assert ("--gpus=1" in call) == (rule != "prepare"), call
        assert "--mem 600" in call, call


def test_a_failed_job_is_submitted_again(tmp_path: Path, slurm: Slurm) -> None:
    workdir = working_copy(tmp_path / "flaky")
    (workdir / "Snakefile").write_text(FLAKY)
    output = on_slurm(workdir, slurm)
    assert (workdir / "done").exists()
    assert slurm.states(workdir) == ["FAILED", "COMPLETED"]
    assert "Trying to restart job" in output
