"""The smoke study through the real workflow, end to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import working_copy

SMOKE = "config/studies/smoke.yaml"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A working copy in which the smoke study has run."""
    folder = working_copy(tmp_path_factory.mktemp("smoke"))
    done = snakemake(folder, "--configfile", SMOKE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def python(
    folder: Path, module: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m module words`` in ``folder``, on the study's own tracking store by default."""
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "snakemake", "--cores", "2", *words)


def test_outputs_for_people(study):
    reports = study / "reports/smoke"
    summary = pd.read_csv(reports / "tables/summary.csv")
    assert len(summary) == 5 and (summary["seeds"] == 2).all()
    assert summary["test_accuracy_mean"].between(0, 1).all()
    for name in (
        "accuracy_units",
        "accuracy_seconds",
        "loss_units",
        "memory_accuracy",
    ):
        assert (reports / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (reports / f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    claims = json.loads((reports / "claims.json").read_text())["claims"]
    words = {"holds here", "does not hold here", "inconclusive here", "untuned", "not tested here"}
    assert {claim["verdict"] for claim in claims} <= words
    assert "\\toprule" in (reports / "tables/summary.tex").read_text()
    page = (reports / "index.html").read_text()
    assert page.count("<figure id=") >= 4 and page.count("<svg") == page.count("<figure id=")
    assert 'src="http' not in page and 'href="http' not in page
    for label in ("BP-Checkpointing", "FmAD-Vanilla", "ZO-Vanilla"):
        assert label in page


def test_an_unchanged_study_does_nothing(study):
    done = snakemake(study, "--configfile", SMOKE)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


def test_adding_a_method_runs_only_what_is_new(study):
    text = (
        (study / SMOKE)
        .read_text()
        .replace("fmad_vanilla, zo_vanilla]", "fmad_vanilla, zo_vanilla, bp_vanilla]")
    )
    (study / "more.yaml").write_text(text)
    done = snakemake(study, "--configfile", "more.yaml", "-n")
    lines = (done.stdout + done.stderr).split("Job stats:")[1]
    counts = dict(
        line.split() for line in lines.splitlines() if len(line.split()) == 2 and line[0].isalpha()
    )
    assert counts["train"] == "1" and counts["cost"] == "1"
    assert "prepare" not in counts


def test_a_label_redraws_reports_and_trains_nothing(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    path = copy / "config/catalog/methods.yaml"
    path.write_text(path.read_text().replace("label: ZO-Vanilla", "label: MeZO"))
    done = snakemake(copy, "--configfile", SMOKE, "-n")
    text = (done.stdout + done.stderr).split("Job stats:")[1]
    assert "train" not in text.split("Reasons:")[0]
    assert "figures" in text and "report" in text


def test_a_claim_is_judged_again_and_nothing_else_runs(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    path = copy / "config/claims.yaml"
    path.write_text(path.read_text().replace("at_most: 1.5", "at_most: 2"))
    planned = snakemake(copy, "--configfile", SMOKE, "-n").stdout.split("Job stats:")[1]
    rules = {line.split()[0] for line in planned.split("\n\n")[0].splitlines()[3:]}
    assert rules == {"claims", "report", "track", "all", "total"}


def test_a_study_without_reference_stops_before_the_first_rule(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    path = copy / "config/catalog/methods.yaml"
    path.write_text(path.read_text().replace("  reference: true\n", ""))
    done = snakemake(copy, "--configfile", SMOKE, "-n")
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "claims need exactly one method" in said and "Traceback" not in said


def test_mistake_stops_before_the_first_rule(study):
    done = snakemake(study, "--configfile", SMOKE, "--config", "seeds=[]")
    assert done.returncode != 0
    assert "seeds" in done.stderr and "Traceback" not in done.stderr


def test_lint_is_clean(study):
    done = python(study, "snakemake", "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_costs_at_full_size_are_traced_and_drawn(study):
    done = snakemake(study, "costs", "--configfile", SMOKE)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = study / "reports/smoke/costs"
    table = pd.read_csv(folder / "costs.csv")
    assert table["method"].tolist() == ["bp_checkpointing", "fmad_vanilla", "zo_vanilla"]
    page = (folder / "index.html").read_text()
    assert page.count("<figure id=") == page.count("<svg ") == 5 and "BERT-base" in page
    (fit,) = json.loads((study / "results/smoke/costs/fits/bert_base.json").read_text())
    assert fit["memory"] == "3GB" and fit["batch"] > 1 and fit["length"] is None
    again = snakemake(study, "costs", "--configfile", SMOKE)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_status_counts_runs(study):
    done = python(study, "costbp", "status", "-c", SMOKE)
    assert "10 runs: 10 done" in done.stdout


def test_mlflow_holds_every_run_once_with_its_metrics(study):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{study / 'mlflow/mlflow.db'}")
    experiment = client.get_experiment_by_name("smoke")
    every = client.search_runs([experiment.experiment_id])
    assert len(every) == 5 + 10 + 1  # experiments, their seeds, the report
    runs = [run for run in every if "outcome" in run.data.tags]
    assert len(runs) == len({run.data.tags["costbp.key"] for run in runs}) == 10
    run = next(r for r in runs if r.data.tags["method"] == "zo_vanilla")
    for tag in ("study", "commit", "method_family", "spec_hash"):
        assert run.data.tags[tag]
    assert run.data.params["optimizer.name"] and run.data.params["seed"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, len(history) + 1)) and len(
        history
    ) > 10
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "record.json",
        "steps.parquet",
    }
    again = python(study, "costbp", "track", "-c", SMOKE)
    assert "0 of 10 runs added" in again.stdout


def test_mlflow_tracking_uri_is_honoured(study, tmp_path):
    uri = f"sqlite:///{tmp_path / 'other.db'}"
    done = python(study, "costbp", "track", "-c", SMOKE, MLFLOW_TRACKING_URI=uri)
    assert f"10 of 10 runs added to {uri}" in done.stdout, done.stderr


def test_the_workflow_killed_in_the_middle_continues_by_the_same_command(study, tmp_path):
    folder = working_copy(tmp_path / "killed")
    shutil.copytree(study / "cache", folder / "cache")
    overlay = {
        "study": "killed",
        "experiments": [
            {
                "models": ["tiny_head"],
                "tasks": ["docstrings"],
                "methods": ["bp_checkpointing", "fmad_vanilla"],
                "budgets": ["units_4k"],
            }
        ],
    }
    (folder / "killed.yaml").write_text(yaml.safe_dump(overlay))
    words = ["--cores", "1", "--configfile", SMOKE, "killed.yaml", "--until", "train_head"]
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(records := sorted(folder.glob("runs/*/*/*/*/*/record.json"))) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in records}
    done = python(folder, "snakemake", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in records} == finished
    assert len(sorted(folder.glob("runs/*/*/*/*/*/record.json"))) == 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ui_answers_with_the_runs(study):
    port = free_port()
    command = [sys.executable, "-m", "costbp", "ui", "-c", SMOKE, "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=study,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = (
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=smoke"
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    experiment = json.load(answer)["experiment"]
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/search",
            json.dumps(
                {"experiment_ids": [experiment["experiment_id"]], "max_results": 100}
            ).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert len(json.load(answer)["runs"]) == 16
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        process.terminate()
        process.wait(20)


def test_ui_says_when_its_port_is_taken(study):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = python(study, "costbp", "ui", "-c", SMOKE, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"costbp: port {port} is already in use; choose another: costbp ui --port {port + 1}"
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        *(
            [name]
            for name in (
                "train",
                "cost",
                "status",
                "ui",
                "tune",
                "trials",
                "track",
                "report",
                "assets",
            )
        ),
    ],
)
def test_help_is_complete(costbp, words):
    done = costbp(*words, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout
