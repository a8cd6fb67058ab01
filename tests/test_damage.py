"""Damaged and deleted files: noticed, made again by the next start, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from costbp.config import Cell, OptimizerSpec, load_plan
from costbp.cost.pairs import pair_costs
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.files import intact, read_cached, seal_of, write_json
from costbp.models.build import build_model
from costbp.train import checkpoint
from costbp.train.damage import damaged
from costbp.train.experiment import run_specs
from costbp.train.loop import Run
from costbp.train.record import CHECKPOINT, STEPS, read_record
from costbp.train.status import counts, statuses
from tests.conftest import working_copy
from tests.small import train_until
from tests.test_workflow import python, snakemake

PAIR = ("tiny_head", "docstrings")
OVERLAY = {
    "study": "damage",
    "seeds": [0],
    "trace_claims": False,
    "experiments": [
        {
            "models": [PAIR[0]],
            "tasks": [PAIR[1]],
            "methods": ["bp_checkpointing", "fmad_multiple"],
            "budgets": ["units_400"],
        }
    ],
    "resources": {"methods_per_job": 1},
    "paths": {"reports": "reports/damage"},
}
SVRG = {"period": 7, "snapshot_batches": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working copy whose data are prepared."""
    folder = working_copy(tmp_path_factory.mktemp("damage"))
    (folder / "damage.yaml").write_text(yaml.safe_dump(OVERLAY))
    with contextlib.chdir(folder):
        prepare(Pair.of(load_plan([Path("damage.yaml")]), *PAIR))
    return folder


@pytest.fixture(scope="module")
def study(place):
    """The same, in which a study of two runs has run."""
    done = snakemake(place, "--configfile", "damage.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture
def copy(study, tmp_path, monkeypatch):
    """The same for a test's own use, made the working directory; its plan."""
    shutil.copytree(study, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return load_plan([Path("damage.yaml")])


def flip(path):
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(place):
    """A spec whose method, differences and optimiser remember; its state at step 3; how it ends."""
    with contextlib.chdir(place):
        plan = load_plan([Path("damage.yaml")])
        spec = plan.spec(Cell(*PAIR, "zo_svrg", "units_400"), 0)
        method = spec.method.model_dump(mode="json") | {"svrg": SVRG}
        spec = spec.model_copy(
            update={
                "method": type(spec.method).model_validate(method),
                "optimizer": OptimizerSpec(name="adamw", lr=1e-3),
            }
        )
        data = load_prepared(prepare(Pair.of(plan, *PAIR)))
        module = build_model(spec.model, len(data.names), Path("none"), 0, data.width)
        run = Run(spec, module, data, torch.device("cpu"))
        train_until(run, lambda state: state.step == 3)
        folder = spec.folder(plan.study.paths.store)
        run_specs(plan, [spec])
        whole = outcome(folder)
        shutil.rmtree(folder)
        return plan, spec, run.state_dict(), whole


def outcome(folder):
    """What a run ended with, times aside."""
    record = read_record(folder)
    steps = pd.read_parquet(folder / STEPS).drop(columns="seconds")
    figures = record.summary.model_dump()
    kept = {k: v for k, v in figures.items() if "seconds" not in k and k != "rss_bytes"}
    return record.outcome, kept, steps.to_csv()


def changed(name, **values):
    def change(state):
        return {**state, name: {**state[name], **values}}

    return change


def without(name, key):
    return lambda state: {**state, name: {k: v for k, v in state[name].items() if k != key}}


BROKEN = {
    "theta of another shape": lambda state: {**state, "theta": state["theta"][:1].clone()},
    "no state of the optimiser": changed("optimizer", state={}),
    "no groups of the optimiser": without("optimizer", "param_groups"),
    "no snapshot": without("estimator", "snapshot"),
    "a short snapshot": changed("estimator", mu=torch.zeros(1)),
    "a counter missing": without("state", "smooth_loss"),
    "a counter too many": changed("state", more=1),
    "a probe without its step": changed("state", probe={"error": 0.1}),
    "a part missing": lambda state: {k: v for k, v in state.items() if k != "kept"},
}


FORMAT_TELLS = ("no state of the optimiser", "no snapshot", "a short snapshot")
CASES = [
    (what, honest)
    for what in (*BROKEN, "all parts by another version", "truncated", "a bit")
    for honest in (False, True)
    if not (honest and what in FORMAT_TELLS)
]


@pytest.mark.parametrize(("what", "honest"), CASES)
def test_a_broken_checkpoint_leaves_nothing_behind(
    stopped, place, monkeypatch, capsys, what, honest
):
    """Damaged, or (honest) written so by another version."""
    monkeypatch.chdir(place)
    plan, spec, state, whole = stopped
    folder = spec.folder(plan.study.paths.store)
    path = folder / CHECKPOINT
    try:
        if what in BROKEN:
            checkpoint.save(BROKEN[what](state), path)
            if not honest:
                saved = torch.load(path, weights_only=True)
                torch.save(saved | {"parts": checkpoint.parts(state)}, path)
        elif what.endswith("version"):
            path.parent.mkdir(parents=True)
            torch.save(state if honest else {"format": 0, "parts": None, "state": state}, path)
        else:
            checkpoint.save(state, path)
            if what == "truncated":
                truncate(path)
            else:
                data, theta = bytearray(path.read_bytes()), state["theta"].numpy().tobytes()
                data[data.index(theta) + 7] ^= 0x40 if honest else 1
                path.write_bytes(data)
        run_specs(plan, [spec])
        said = capsys.readouterr().err
        assert outcome(folder) == whole
        assert said.count("can't be used") == 1 and "starting from step 0" in said
    finally:
        shutil.rmtree(folder)


def test_a_sound_checkpoint_is_used(stopped, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    plan, spec, state, whole = stopped
    folder = spec.folder(plan.study.paths.store)
    checkpoint.save(state, folder / CHECKPOINT)
    run_specs(plan, [spec])
    assert "continuing from step 3" in capsys.readouterr().err
    ended, figures, steps = outcome(folder)
    shutil.rmtree(folder)
    assert figures.pop("resumed") == 1
    assert (ended, {**figures, "resumed": 0}, steps) == whole


# --- files of the store, of caches and of results --------------------------------------------------


def tables():
    """What people read, times aside."""
    summary = pd.read_csv("reports/damage/tables/summary.csv")
    return summary[[c for c in summary if "seconds" not in c]].to_csv()


@pytest.mark.parametrize("harm", [flip, truncate])
def test_the_next_start_makes_all_damaged_files_again_and_nothing_else(copy, harm):
    plan, before = copy, tables()
    results, (first, second) = plan.results, [plan.specs(cell)[0] for cell in plan.cells()]
    kept, lost = (spec.folder(plan.study.paths.store) for spec in (first, second))
    written = (kept / "record.json").stat().st_mtime_ns
    files = [
        lost / (STEPS if harm is flip else "record.json"),
        results / "runs.parquet",
        results / "plan.json",
        results / "cost" / PAIR[0] / f"{PAIR[1]}.json",
        plan.prepared(*PAIR),
        *Path("cache/cost").rglob("*.json"),
    ]
    for file in files:
        harm(file)
    assert counts(statuses(plan)) == {"done": 1, "damaged": 1}
    held = {path: path.read_bytes() for path in results.rglob("*.json") if path.name != "plan.json"}
    planned = snakemake(Path(), "--configfile", "damage.yaml", "-n")
    stats = planned.stdout.split("Job stats:")[1].split("\n\n")[0]
    jobs = dict(line.split() for line in stats.splitlines()[3:])
    assert jobs.pop("train_head") == jobs.pop("cost") == "1" and "prepare" not in jobs
    assert f"{lost} is damaged" in planned.stderr
    assert {path: path.read_bytes() for path in held} == held  # a dry run leaves all as it was
    done = snakemake(Path(), "--configfile", "damage.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(intact(file) for file in files)
    assert tables() == before and counts(statuses(plan)) == {"done": 2}
    assert (kept / "record.json").stat().st_mtime_ns == written
    again = snakemake(Path(), "--configfile", "damage.yaml")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_deleted_run_is_made_again_though_nothing_is_sealed(copy):
    """What older versions wrote has no seals and is valid."""
    plan, before = copy, tables()
    for seal in [*Path("results").rglob(".*.sha256"), *Path("runs").rglob(".*.sha256")]:
        seal.unlink()
    assert list(damaged(plan)) == [] and counts(statuses(plan)) == {"done": 2}
    folder = plan.specs(next(plan.cells()))[0].folder(plan.study.paths.store)
    shutil.rmtree(folder)
    ((manifest, why),) = damaged(plan)
    assert why == f"{folder} has no record" and "bp_checkpointing" in manifest.name
    said = python(Path(), "costbp", "aggregate", "-c", "damage.yaml").stderr
    assert said == f"costbp: {folder}: no record; run `snakemake` to compute it\n"
    done = snakemake(Path(), "--configfile", "damage.yaml")
    assert done.returncode == 0 and list(damaged(plan)) == [] and tables() == before


def test_a_damaged_manifest_or_table_is_named(copy):
    manifests = sorted((copy.results / "train").rglob("*.json"))
    flip(manifests[0])
    seal_of(manifests[1]).unlink()
    truncate(manifests[1])
    flip(copy.results / "curves.parquet")
    found = dict(damaged(copy))
    assert set(found) == {*manifests, copy.results / "curves.parquet"}
    assert found[manifests[1]] == "it can't be read"
    done = python(Path(), "costbp", "tables", "-c", "damage.yaml")
    assert done.stderr.endswith("curves.parquet is damaged; run `costbp aggregate`\n")


def test_a_damaged_cost_is_counted_again(copy, capsys):
    (path,) = Path("cache/cost").rglob("bp_checkpointing-*.json")
    before = pair_costs(copy, *PAIR, ["bp_checkpointing"])
    seal_of(path).unlink()  # as an older version left it
    truncate(path)
    after = pair_costs(copy, *PAIR, ["bp_checkpointing"])
    assert after == before and "is damaged; it is made anew" in capsys.readouterr().err
    assert intact(path) and seal_of(path).exists()


def test_a_seal_covers_every_bit(tmp_path):
    path = tmp_path / "some.json"
    write_json(path, {"value": 1})
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert not intact(path)
    path.write_bytes(data)
    assert read_cached(path, json.loads) == {"value": 1}
    seal_of(path).write_bytes(b"\xff\xfe")
    assert not intact(path)
