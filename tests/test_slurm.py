"""Studies through a real Slurm: same tables on several nodes, GPU asked for, failures retried, jobs that are
cancelled, preempted or out of time continued bit-equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import working_copy
from tests.slurm import cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

if not os.environ.get("CI"):
    pytest.skip("starts a Slurm cluster for five minutes: set CI=1", allow_module_level=True)
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

ON_SLURM = (
    *("--profile", "workflow/profiles/slurm", "--jobs", "3"),
    *("--slurm-init-seconds-before-status-checks", "4"),
)

FLAKY = """\
rule flaky:
    output:
        "done",
    shell:
        "if [ -e tried ]; then touch {output}; else touch tried; exit 3; fi"
"""


# Backpropagation whose steps take long while a file is there.
SLOW = """\
import time
from pathlib import Path

from costbp.estimators.backprop import Backprop
from costbp.estimators.memory_plans import Keeping


class Slow(Backprop):
    def estimate(self, objective, batches, key):
        if self.flag.exists():
            time.sleep(6)
        return super().estimate(objective, batches, key)


def build(flag):
    found = Slow(Keeping(0))
    found.flag = Path(flag)
    return found
"""
FATES = ("cancelled", "preempted", "too_long")
RESUMED = {
    "entries": {
        "methods": {
            fate: {
                "label": fate,
                "family": "bp",
                "reference": False,
                "estimator": {
                    "kind": "python",
                    "file": "slow.py",
                    "function": "build",
                    "options": {"flag": f"slow-{fate}"},
                },
                "optimizer": {"name": "adamw", "lr": 1e-3},
            }
            for fate in FATES
        }
    },
    "experiments": [
        {
            "models": ["tiny_lora"],
            "tasks": ["docstrings"],
            "methods": ["bp_checkpointing", *FATES],
            "budgets": ["units_400"],
        }
    ],
    "seeds": [0],
    "device": "cpu",
    "resources": {"methods_per_job": 1, "gpu": 1, "mem_mb": 600, "runtime": 1},
}


@dataclass(frozen=True)
class Job:
    """A job as the queue shows it."""

    number: str
    state: str
    node: str
    begun: str
    comment: str


@dataclass(frozen=True)
class Slurm:
    """A running cluster: where it lives, and the environment of its commands."""

    folder: Path
    environment: dict[str, str]

    def submissions(self) -> list[str]:
        """Arguments of every sbatch so far."""
        return cluster.calls(self.folder, "sbatch")

    def do(self, *words: str) -> str:
        """Run a command of Slurm; returns what it printed."""
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=True
        ).stdout

    def jobs(self, workdir: Path) -> list[Job]:
        """Every job submitted from a folder, in order of submission."""
        columns = "--format=%i|%T|%N|%S|%k|%Z"
        told = self.do("squeue", "--noheader", "--states=all", "--sort=i", columns)
        lines = (line.split("|") for line in told.splitlines())
        return [Job(*line) for *line, folder in lines if folder == str(workdir)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One cluster for the module."""
    folder = tmp_path_factory.mktemp("slurm")
    with cluster.running(folder) as environment:
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
    return snakemake(workdir, slurm.environment, *ON_SLURM, *words)


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
    jobs = slurm.jobs(remote)
    assert [job.state for job in jobs] == ["COMPLETED"] * 7
    assert len({job.node for job in jobs}) > 1, "nodes share the folder"
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
    assert [job.state for job in slurm.jobs(workdir)] == ["FAILED", "COMPLETED"]
    assert "Trying to restart job" in output


def run_of(workdir: Path, method: str) -> Path:
    """The folder of a method's one run."""
    (folder,) = (workdir / "runs/tiny_lora/docstrings" / method / "units_400").glob("seed=0-*")
    return folder


def test_jobs_that_were_cancelled_preempted_or_out_of_time_continue_bit_equal(
    tmp_path: Path, slurm: Slurm
) -> None:
    """Each is stopped in a long step, before any checkpoint but the one it writes when told to end."""
    local, remote = working_copy(tmp_path / "local"), working_copy(tmp_path / "remote")
    study = ["config/studies/smoke.yaml", "overlay.yaml"]
    for workdir in (local, remote):
        (workdir / "slow.py").write_text(SLOW)
        (workdir / "overlay.yaml").write_text(yaml.safe_dump(RESUMED))
    manifests = [f"results/smoke/train/tiny_lora/docstrings/units_400/{f}.json" for f in FATES]
    words = [*manifests, "--configfile", *study]
    for fate in FATES:
        (remote / f"slow-{fate}").touch()

    def job(fate: str, attempt: int = 0) -> Job:
        return [job for job in slurm.jobs(remote) if fate in job.comment][attempt]

    def training(fate: str) -> bool:
        folder = remote / "runs/tiny_lora/docstrings" / fate
        return any(folder.glob("*/*/progress.json"))

    command = [sys.executable, "-m", "snakemake", *ON_SLURM, *words]
    with (tmp_path / "out").open("w") as out:
        running = subprocess.Popen(
            command, cwd=remote, env=slurm.environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            snakemake(local, dict(os.environ), "--cores", "1", *words)
            for fate in ("cancelled", "preempted"):
                wait(lambda fate=fate: training(fate), running)
            together = {job(fate).node for fate in FATES if job(fate).state == "RUNNING"}
            assert len(together) == len(FATES), "jobs of one study on several nodes at once"

            slurm.do("scancel", job("cancelled").number)
            wait(lambda: job("cancelled").state == "CANCELLED", running)
            (remote / "slow-cancelled").unlink()

            urgent = ("--partition", cluster.URGENT, "--nodelist", job("preempted").node)
            slurm.do("sbatch", *urgent, "--chdir", str(tmp_path), "--wrap", "true")
            wait(lambda: job("preempted").state == "PENDING", running)
            (remote / "slow-preempted").unlink()
            # a job that was requeued has to wait for two minutes
            slurm.do("scontrol", "update", f"jobid={job('preempted').number}", "StartTime=now")

            wait(lambda: job("too_long").state == "TIMEOUT", running)
            (remote / "slow-too_long").unlink()
            assert running.wait(timeout=180) == 0, (tmp_path / "out").read_text()[-8000:]
        finally:
            running.terminate()
            running.wait()

    for fate in FATES:
        one, other = run_of(local, fate), run_of(remote, fate)
        a, b = pd.read_parquet(one / "steps.parquet"), pd.read_parquet(other / "steps.parquet")
        pd.testing.assert_frame_equal(
            a.drop(columns="seconds"), b.drop(columns="seconds"), check_exact=True
        )
        first, second = (json.loads((f / "record.json").read_text()) for f in (one, other))
        assert first["summary"]["test_accuracy"] == second["summary"]["test_accuracy"]
        assert [r["summary"]["resumed"] for r in (first, second)] == [0, 1], fate

    limits = [
        call.split(" -t ")[1].split()[0] for call in slurm.submissions() if "too_long" in call
    ]
    assert limits == ["1", "2"], "more time with the second attempt"


def wait(condition: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    """Poll until the condition holds, as long as Snakemake runs."""
    until = time.monotonic() + 240
    while not condition():
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.5)
