"""Runs through the store: budgets, outcomes, stop and resume, damaged records."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from costbp.analysis.frames import Frames
from costbp.analysis.report import differences
from costbp.config import Cell, OptimizerSpec, load_plan
from costbp.config.tuning import Setting, Tuned
from costbp.cost.pairs import pair_costs
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.device_pool import first_free
from costbp.errors import UserError
from costbp.estimators.probe import Probe
from costbp.models.build import build_model
from costbp.train.experiment import Stop, run_specs
from costbp.train.loop import Run
from costbp.train.record import RECORD, STEPS, Record, Summary, read_record
from tests.conftest import working_copy
from tests.small import train_until

HEAD = Cell("tiny_head", "docstrings", "fmad_multiple", "units_400")
SMOKE = Path("config/studies/smoke.yaml")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The cache with both pairs of the smoke study, which take seconds to read."""
    folder = working_copy(tmp_path_factory.mktemp("prepared"))
    with contextlib.chdir(folder):
        plan = load_plan([SMOKE])
        for model in ("tiny_lora", "tiny_head"):
            prepare(Pair.of(plan, model, "docstrings"))
    return folder / "cache"


@pytest.fixture
def plan(workdir, prepared):
    shutil.copytree(prepared, workdir / "cache")
    return load_plan([SMOKE])


def prepared_run(plan, spec):
    data = load_prepared(prepare(Pair.of(plan, *spec.cell[:2])))
    module = build_model(spec.model, len(data.names), Path("none"), spec.seed, data.width)
    return Run(spec, module, data, torch.device("cpu"))


def test_a_run_stops_before_it_exceeds_its_budget(plan):
    (record, _) = run_specs(plan, plan.specs(HEAD))
    assert record.outcome == "completed"
    assert record.summary.steps == 44  # 9 units a step
    assert record.summary.forward_units == 396
    assert record.summary.d == 64 * 4 + 4


def test_record_schema_and_steps(plan):
    (record, _) = run_specs(plan, plan.specs(HEAD))
    folder = record.spec.folder(plan.study.paths.store)
    data = json.loads((folder / RECORD).read_text())
    assert set(data) == set(Record.model_fields)
    assert set(data["summary"]) == set(Summary.model_fields)
    assert data["environment"]["torch"] == torch.__version__
    steps = pd.read_parquet(folder / STEPS)
    training, evaluated = steps[steps["loss"].notna()], steps[steps["validation_accuracy"].notna()]
    assert training["step"].tolist() == list(range(1, 45))
    assert evaluated["step"].tolist() == [0, 12, 23, 44]
    assert training["forward_units"].diff().dropna().eq(9).all()
    seal = ".record.json.sha256"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", seal, RECORD, STEPS]


def soon(method):
    """Snapshots, masks and calibrations before and after the stop at step 17."""
    text = method.model_dump(mode="json")
    if text["svrg"]:
        text["svrg"] = {"period": 7, "snapshot_batches": 2}
    directions = text["estimator"].get("directions", {})
    for key in {"refresh", "every"} & set(directions):
        directions[key] = 11
    return type(method).model_validate(text)


@pytest.mark.parametrize(
    "method",
    ["bp_checkpointing", "zo_vanilla", "zo_svrg", "fmad_sparse", "zo_adaptive", "lozo", "hizoo"],
)
def test_stop_and_resume_is_bit_equal(plan, method):
    spec = plan.spec(Cell("tiny_lora", "docstrings", method, "units_96"), 0)
    spec = spec.model_copy(update={"method": soon(spec.method)})
    whole = prepared_run(plan, spec)
    whole.train(lambda progress: None)

    first = prepared_run(plan, spec)
    train_until(first, lambda state: state.step == 17)
    path = Path("checkpoint.pt")
    torch.save(first.state_dict(), path)
    second = prepared_run(plan, spec)
    second.load_state_dict(torch.load(path, weights_only=True))
    second.train(lambda progress: None)
    assert torch.equal(whole.objective.theta, second.objective.theta)
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in second.state.rows]
    assert timeless == [
        {k: v for k, v in row.items() if k != "seconds"} for row in whole.state.rows
    ]
    assert second.state.resumed == 1


def test_divergence_is_a_result(plan):
    spec = plan.spec(HEAD, 0).model_copy(update={"optimizer": OptimizerSpec(name="sgd", lr=1e6)})
    (record,) = run_specs(plan, [spec])
    assert record.outcome == "diverged"
    assert "times its start" in record.message or "not finite" in record.message


def test_a_budget_below_one_step_fails_with_a_clear_line(plan):
    spec = plan.spec(HEAD, 0)
    tiny = spec.model_copy(update={"budget": spec.budget.scaled(0.01)})
    with pytest.raises(UserError, match=r"budget of 4 forward units is below the 9\.00") as caught:
        run_specs(plan, [tiny])
    assert caught.value.code == 1
    assert read_record(tiny.folder(plan.study.paths.store)).outcome == "failed"


def test_a_budget_that_steps_leave_unspent_is_said(plan, capsys):
    spec = plan.spec(HEAD, 0)
    run_specs(plan, [spec])
    assert "of the budget" not in capsys.readouterr().err  # 396 of 400 units
    short = spec.model_copy(update={"budget": spec.budget.scaled(0.06)})
    (record,) = run_specs(plan, [short])
    assert record.summary.forward_units == 18  # of 24
    assert "75 % of the budget is spent" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again_and_a_half_written_one_is(plan, capsys):
    (record, _) = run_specs(plan, plan.specs(HEAD))
    path = record.spec.folder(plan.study.paths.store) / RECORD
    written = path.stat().st_mtime_ns
    run_specs(plan, plan.specs(HEAD))
    assert path.stat().st_mtime_ns == written
    path.write_text(path.read_text()[:100])
    (again, _) = run_specs(plan, plan.specs(HEAD))
    assert "is incomplete or damaged; the run is computed again" in capsys.readouterr().err
    assert again.summary.test_accuracy == record.summary.test_accuracy
    assert again.outcome == "completed"


def test_a_damaged_checkpoint_is_a_warning(plan, capsys):
    spec = plan.spec(HEAD, 0)
    folder = spec.folder(plan.study.paths.store)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"half")
    (record,) = run_specs(plan, [spec])
    assert "can't be used" in capsys.readouterr().err
    assert record.outcome == "completed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_the_next_run_continues(costbp, workdir, plan, number):
    cell = Cell("tiny_head", "docstrings", "fmad_vanilla", "units_4k")
    words = [f"--{k}={v}" for k, v in cell._asdict().items()]
    command = [sys.executable, "-m", "costbp", "train", "-c", str(SMOKE), *words]
    folders = [spec.folder(plan.study.paths.store) for spec in plan.specs(cell)]
    prepare(Pair.of(plan, "tiny_head", "docstrings"))
    process = subprocess.Popen(command, cwd=workdir, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((folders[0] / RECORD).exists() and (folders[1] / ".lock").exists()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -9), err
    if number == signal.SIGINT:
        assert "interrupted at step" in err and "Traceback" not in err
    untouched = (folders[0] / RECORD).stat().st_mtime_ns
    done = costbp("train", "-c", str(SMOKE), *words)
    assert done.returncode == 0, done.stderr
    assert (folders[0] / RECORD).stat().st_mtime_ns == untouched
    assert read_record(folders[1]).outcome == "completed"
    if number == signal.SIGINT:
        assert "continuing from step" in done.stderr


def test_unwritable_output_is_one_line(costbp, workdir):
    (workdir / "runs").write_text("a file where a folder should be")
    words = [f"--{k}={v}" for k, v in HEAD._asdict().items()]
    done = costbp("train", "-c", str(SMOKE), *words)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("costbp: cannot write to runs/")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_output_is_one_line(costbp, workdir):
    (workdir / "runs").mkdir(mode=0o500)
    words = [f"--{k}={v}" for k, v in HEAD._asdict().items()]
    done = costbp("train", "-c", str(SMOKE), *words)
    assert done.returncode == 2 and "cannot write to runs/" in done.stderr


def test_device_slots_are_distinct(tmp_path):
    names = ["GPU-a", "MIG-b/3/0"]
    with first_free(names, tmp_path) as one, first_free(names, tmp_path) as two:
        assert {one, two} == {0, 1}
    with first_free(names, tmp_path) as again:
        assert again == 0


def test_stop_restores_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_records_how_it_took_its_steps(plan):
    spec = plan.spec(HEAD._replace(method="zo_vanilla"), 0)
    (record,) = run_specs(plan, [spec])
    summary = record.summary
    assert (summary.eps, summary.float32, summary.probe_forwards) == (1e-3, False, 16)
    assert summary.difference_snr > 1e3 and summary.difference_cosine > 0.999
    assert summary.learning_rate == spec.optimizer.lr
    assert summary.forward_units == 2 * summary.steps == 400  # the probe is not charged
    assert 0 < summary.forward_seconds < summary.step_seconds < summary.seconds
    assert summary.counting_seconds > 0
    assert summary.allocated_bytes is None and summary.predicted_bytes is None
    (exact,) = run_specs(plan, plan.specs(HEAD)[:1])
    assert exact.summary.eps is None and exact.summary.difference_snr is None


def test_differences_that_are_noise_are_told_in_run_and_report(plan, capsys):
    spec = plan.spec(HEAD._replace(method="zo_vanilla"), 0)
    oracle = spec.method.estimator.oracle.model_copy(update={"eps": 1e-9})
    estimator = spec.method.estimator.model_copy(update={"oracle": oracle})
    method = spec.method.model_copy(update={"estimator": estimator})
    (record,) = run_specs(plan, [spec.model_copy(update={"method": method})])
    assert record.summary.difference_snr <= 1 and record.summary.eps == 1e-9
    assert "mostly noise: signal to noise" in capsys.readouterr().err
    names = dict(zip(("model", "method"), ("tiny_head", "zo_vanilla"), strict=True))
    runs = pd.DataFrame([names | record.summary.figures()])
    first, noisy = differences(plan, Frames(runs, pd.DataFrame(), pd.DataFrame()))
    assert "eps 1e-09; 16 forwards a run" in first and "float32" not in first
    assert "ZO-Vanilla on random 2-layer encoder, head only" in noisy and "mostly noise" in noisy


def test_a_resumed_run_keeps_the_step_of_its_differences(plan):
    spec = plan.spec(HEAD._replace(method="zo_vanilla"), 0)
    first = prepared_run(plan, spec)
    first.state.probe = vars(Probe(0.25, True, 0.1, None, 16))
    second = prepared_run(plan, spec)
    second.load_state_dict(first.state_dict())
    assert second.estimator.difference.step == 0.25 and second.estimator.difference.float32


def test_state_in_the_cost_table_is_that_of_the_tuned_optimiser(plan):
    """AdamW's moments count where it is what trains, though the catalog's default has none."""
    model, task, method, _ = HEAD
    moments = OptimizerSpec(name="adamw", lr=0.001)
    found = Tuned(key="any", choice=Setting(**moments.model_dump()))
    choices = ({}, {model: {task: {method: {"units_400": found}}}})
    plans = [plan.model_copy(update={"tuned": choice}) for choice in choices]
    plain, tuned = (pair_costs(p, model, task, [method])[0] for p in plans)
    assert tuned.state_bytes - plain.state_bytes == 2 * 4 * plain.d + 4
    assert tuned.flops == plain.flops


def test_one_lucky_batch_at_the_start_is_no_divergence(plan):
    run = prepared_run(plan, plan.specs(HEAD)[0])
    losses = [0.05, *[2.0] * 60]
    assert all(run._diverged(loss, 1.0) == "" for loss in losses)
    assert any(run._diverged(10 * math.log(4) * 1.2, 1.0) for _ in range(60))
