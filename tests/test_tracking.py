"""MLflow: what it is told, once; broken databases, dead servers and signals to the UI."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError

from costbp.config import load_plan
from costbp.config.study import Cell, Plan
from costbp.errors import UserError
from costbp.tracking import database, mlflow_store
from costbp.tracking.mlflow_store import live, sync
from costbp.train.record import CHECKPOINT, Record, Summary, write_run
from tests.conftest import ROOT

FINISHED = datetime(2026, 11, 1, tzinfo=UTC)
CELLS = 5
DIVERGED = ("tiny_lora", "docstrings", "fmad_vanilla", "units_96")
FAILED = ("tiny_lora", "docstrings", "zo_vanilla", "units_96")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A database as MLflow makes it, which takes seconds."""
    folder = tmp_path_factory.mktemp("whole")
    database.prepare(folder / "mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def made(whole, monkeypatch) -> Path:
    """The same, copied wherever one is made."""
    monkeypatch.setattr(database, "_create", lambda path: shutil.copy(whole, path))
    return whole


@pytest.fixture
def plan(workdir, made) -> Plan:
    """The smoke study, all of whose seeds but one have finished; one diverged, one failed."""
    plan = load_plan([Path("config/studies/smoke.yaml")])
    for cell in plan.cells():
        for spec in plan.specs(cell):
            if (spec.cell, spec.seed) != (FAILED, 1):
                outcomes = {(DIVERGED, 0): "diverged", (FAILED, 0): "failed"}
                finish(plan, spec, outcomes.get((spec.cell, spec.seed), "completed"))
    return plan


def finish(plan, spec, outcome="completed", when=FINISHED) -> Record:
    record = Record(
        hash=spec.hash,
        spec=spec,
        outcome=outcome,
        summary=Summary(test_accuracy=0.5 + 0.25 * spec.seed, peak_bytes=10**8 * (1 + spec.seed)),
        environment={"commit": "9782a3f11111", "device": "cpu"},
        finished=when,
    )
    rows = [{"step": step, "seconds": step / 10, "loss": 1 / step} for step in range(1, 4)]
    write_run(spec.folder(plan.study.paths.store), record, rows)
    return record


def runs(where: str = "", name: str = "smoke"):
    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').resolve()}")
    return client.search_runs([client.get_experiment_by_name(name).experiment_id], where)


def seeds(where: str = ""):
    return {
        (r.data.tags["method"], r.data.tags["model"], r.data.params["seed"]): r
        for r in runs(where)
        if "seed" in r.data.params
    }


def test_seeds_stand_below_their_experiment_with_method_and_seed_first(plan):
    assert sync(plan) == (9, 9)
    found = runs()
    parents = {r.info.run_id: r for r in found if "outcome" not in r.data.tags}
    assert len(parents) == CELLS and len(found) == CELLS + 9
    for key, run in seeds().items():
        parent = parents[run.data.tags["mlflow.parentRunId"]]
        place = f"{key[1]}/docstrings/{run.data.tags['budget']}"
        assert run.info.run_name == f"{key[0]} {key[2]} {place}"
        assert parent.info.run_name == f"{key[0]} {place}"
    both = next(r for r in parents.values() if r.data.tags["method"] == "bp_checkpointing")
    assert both.data.metrics["mean.test_accuracy"] == 0.625
    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').resolve()}")
    one = seeds()[("zo_vanilla", "tiny_lora", "0")]
    points = client.get_metric_history(one.info.run_id, "final.test_accuracy")
    assert [(p.step, p.value) for p in points] == [(0, 0.5)]
    kind = client.get_experiment_by_name("smoke").tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"


def test_status_says_how_a_run_ended_and_follows_it(plan):
    missing = next(s for s in plan.specs(Cell(*FAILED)) if s.seed == 1)
    folder = missing.folder(plan.study.paths.store)
    folder.mkdir(parents=True)
    (folder / CHECKPOINT).touch()
    assert sync(plan) == (9, 9)
    found = {key: (r.info.status, r.data.tags["outcome"]) for key, r in seeds().items()}
    assert found.pop(("fmad_vanilla", "tiny_lora", "0")) == ("FINISHED", "diverged")
    assert found.pop(("zo_vanilla", "tiny_lora", "0")) == ("FAILED", "failed")
    assert found.pop(("zo_vanilla", "tiny_lora", "1")) == ("KILLED", "interrupted")
    assert set(found.values()) == {("FINISHED", "completed")} and len(found) == 7
    assert sync(plan) == (0, 9)
    for spec in plan.specs(Cell(*FAILED)):
        finish(plan, spec, when=FINISHED + timedelta(hours=1))
    assert sync(plan) == (2, 10)
    found = {
        (r.info.status, r.data.tags["outcome"])
        for r in seeds("tags.method = 'zo_vanilla'").values()
    }
    assert found == {("FINISHED", "completed")} and len(runs()) == CELLS + 10
    (parent,) = runs("tags.method = 'zo_vanilla' and metrics.mean.test_accuracy > 0")
    assert parent.data.metrics["mean.test_accuracy"] == 0.625


def test_logging_again_adds_nothing_and_replaces_an_older_layout(plan, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store, "LAYOUT", "1")
        sync(plan)
    old = {run.info.run_id for run in seeds().values()}
    assert sync(plan) == (9, 9)
    assert len(runs()) == CELLS + 9 and not old & {run.info.run_id for run in runs()}
    before = {run.info.run_id for run in runs()}
    assert sync(plan) == (0, 9) and {run.info.run_id for run in runs()} == before


def test_the_report_is_attached_and_attached_again_when_it_changes(plan):
    page = plan.study.paths.reports / "index.html"
    (page.parent / "figures").mkdir(parents=True)
    (page.parent / "figures/one.png").touch()
    client = MlflowClient(f"sqlite:///{Path('mlflow/mlflow.db').resolve()}")
    for text in ("first", "second", "second"):
        page.write_text(text)
        sync(plan)
        (run,) = runs("attributes.run_name = 'report of smoke'")
        found = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert found == {"index.html", "figures"}
        assert Path(client.download_artifacts(run.info.run_id, "index.html")).read_text() == text


def test_the_queries_of_the_docs_find_what_they_say(plan):
    sync(plan)
    text = (ROOT / "docs/mlflow.md").read_text()
    filters = re.findall(r"^\|[^|]+\| `(.+)` \|$", text, re.MULTILINE)
    best, method, diverged, budget, commit = [runs(where) for where in filters]
    assert not best  # all of these took a hundred million bytes or more
    assert len(runs(filters[0].replace("< 100000000", "< 150000000"))) == CELLS
    assert {(r.data.tags["method"], r.data.params["seed"]) for r in method} == {("zo_vanilla", "0")}
    assert [r.info.run_name.split()[:2] for r in diverged] == [["fmad_vanilla", "0"]]
    assert {r.data.tags["method"] for r in budget} == {
        "bp_checkpointing",
        "fmad_vanilla",
        "zo_vanilla",
    } and len(budget) == 3
    assert len(commit) == 9
    (code,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    said = subprocess.run(
        [sys.executable, "-c", code.replace("< 100000000", "< 150000000")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.count("bp_checkpointing") == 2, said.stdout


# --- the database -----------------------------------------------------------------------------------


def half_made(path: Path) -> None:
    """As a process leaves it that is killed between a migration and its mark."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'f5a4f2784254'")
        connection.commit()


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE span_metrics")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    """A bit of a column's name, which is no damage that SQLite sees."""
    content = path.read_bytes()
    assert b"artifact_uri" in content
    path.write_bytes(content.replace(b"artifact_uri", b"artifact_uqi"))


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192:9216] = bytes(1024)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [half_made, without_a_table, truncated, empty, flipped, overwritten]
)
def test_a_broken_database_is_set_aside_and_made_anew(tmp_path, made, capsys, harm):
    path = tmp_path / "mlflow.db"
    shutil.copy(made, path)
    database.prepare(path)
    assert capsys.readouterr().err == ""
    harm(path)
    broken = path.read_bytes()
    Path(f"{path}-wal").write_bytes(b"old")
    database.prepare(path)
    (aside,) = tmp_path.glob("mlflow.set-aside-*.db")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and aside.name in said
    assert path.read_bytes() == made.read_bytes() and not Path(f"{path}-wal").exists()
    assert harm is half_made or aside.read_bytes()[-99:] == broken[-99:]


def test_a_database_that_is_in_use_is_not_set_aside(tmp_path, made, monkeypatch):
    path = tmp_path / "mlflow.db"
    shutil.copy(made, path)
    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: plain(path, timeout=0.01))
    with closing(plain(path)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            database.prepare(path)
    assert path.exists()


def test_a_creation_that_is_killed_leaves_nothing_behind(tmp_path):
    path = tmp_path / "mlflow.db"
    code = f"from costbp.tracking.database import *; prepare(Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not list(tmp_path.glob(".mlflow.db.*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not path.exists()
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(2)]
    assert [process.wait() for process in several] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "artifacts", "mlflow.db"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_is_one_line(plan, monkeypatch):
    def full(path: Path) -> None:
        raise OperationalError("CREATE TABLE runs", {}, sqlite3.OperationalError("disk is full"))

    monkeypatch.setattr(database, "_create", full)
    with pytest.raises(UserError, match="disk is full") as caught:
        sync(plan)
    assert "\n" not in str(caught.value) and "`costbp track` logs" in str(caught.value)


# --- the server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("listens", [False, True])
def test_a_dead_server_is_asked_once(plan, monkeypatch, capsys, listens):
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def accept() -> None:
            with contextlib.suppress(OSError):  # until it is closed
                while True:
                    accepted.append(server.accept())

        if listens:
            threading.Thread(target=accept, daemon=True).start()
        else:
            server.close()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
        monkeypatch.setattr(mlflow_store, "PATIENCE", 1.0 if listens else 60.0)
        log = live(plan)
        for spec in plan.specs(next(iter(plan.cells()))):
            log(finish(plan, spec))
        said = capsys.readouterr().err
        assert len(said) < 250 and said.count("warning") == said.count("\n") == 1
        assert "`costbp track` logs" in said and "secret" not in said
        assert len(accepted) == listens


STAND_IN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"])
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_ui_ends_its_server_and_what_that_started(number):
    code = "import os, sys; from costbp.tracking.ui import _run; sys.exit(_run(sys.argv[1:], os.environ))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", STAND_IN],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stdout.read() == ""  # the pipe's last writer is gone
