"""Runs too large for their device: recorded at any moment, shown, and not repeated."""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from costbp import device
from costbp.analysis import frames
from costbp.analysis.claims import write as write_claims
from costbp.analysis.figures import write as draw
from costbp.analysis.report import unusual
from costbp.analysis.report import write as write_page
from costbp.analysis.tables import write as tabulate
from costbp.config import Cell, load_plan
from costbp.cost.pairs import traced_cost
from costbp.data.pairs import Pair
from costbp.data.prepare import prepare
from costbp.estimators.projected import Projected
from costbp.files import write_json
from costbp.train import experiment
from costbp.train.experiment import run_specs
from costbp.train.loop import Run
from costbp.train.record import read_record
from costbp.train.scores import Scorer
from tests.conftest import working_copy
from tests.small_studies import lay_over, run_jobs, shortened

SMOKE = Path("config/studies/smoke.yaml")
HEAD = Cell("tiny_head", "docstrings", "fmad_multiple", "units_400")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = working_copy(tmp_path_factory.mktemp("unfit"))
    with contextlib.chdir(folder):
        prepare(Pair.of(load_plan([SMOKE]), "tiny_head", "docstrings"))
    return folder / "cache"


@pytest.fixture
def plan(workdir, cache):
    (workdir / "cache").symlink_to(cache)
    return load_plan([SMOKE])


def no_room(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore words.")


MOMENTS = {
    "the model moves to the device": (experiment, "build_model", 0),
    "the first step": (Projected, "estimate", 0),
    "the test split is scored": (Run, "_tested", 44),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_out_of_memory_is_a_result_at_any_moment(plan, monkeypatch, moment, capsys):
    place, name, steps = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, no_room)
        records = run_specs(plan, plan.specs(HEAD))
    assert [record.outcome for record in records] == ["out_of_memory"] * 2
    for record in records:
        assert record.message == "CUDA out of memory. Tried to allocate 20.00 GiB."
        assert record.summary.steps == steps and record.summary.test_accuracy is None
        assert read_record(record.spec.folder(plan.study.paths.store)) == record
    assert "Traceback" not in capsys.readouterr().err
    again = run_specs(plan, plan.specs(HEAD))  # with all the room in the world: not repeated
    assert again == records


def test_a_cpu_without_memory_is_out_of_memory_and_other_errors_are_not():
    said = "[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory"
    assert device.out_of_memory(RuntimeError(said)) and device.out_of_memory(MemoryError())
    assert device.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not device.out_of_memory(RuntimeError("shapes don't match"))
    assert not device.out_of_memory(ValueError("out of memory"))


def test_a_run_without_room_leaves_none_of_it_to_the_next(plan, monkeypatch):
    """What the first run held is gone, and the allocator has been asked to let go, before the
    second is built."""
    held, freed = [], []
    build, estimate = experiment.build_model, Projected.estimate

    def building(*args):
        gc.disable()  # nothing but what `free` collects
        assert all(reference() is None for reference in held)
        module = build(*args)
        held.append(weakref.ref(module))
        return module

    def estimating(self, objective, batches, key):
        if len(held) == 1 and key.step == 3:
            no_room()
        return estimate(self, objective, batches, key)

    monkeypatch.setattr(experiment, "build_model", building)
    monkeypatch.setattr(Projected, "estimate", estimating)
    plain = device.free
    monkeypatch.setattr(experiment, "free", lambda where: (freed.append(where), plain(where)))
    try:
        first, second = run_specs(plan, plan.specs(HEAD))
    finally:
        gc.enable()
    assert first.outcome == "out_of_memory" and first.summary.steps == 3
    assert second.outcome == "completed" and len(freed) == 1


def limited(plan, memory, **more):
    resources = plan.study.resources.model_copy(update={"memory": memory})
    study = plan.study.model_copy(update={"resources": resources, **more})
    return plan.model_copy(update={"study": study})


@pytest.fixture
def traced(monkeypatch):
    """A step of three MiB by its trace."""
    record = SimpleNamespace(bytes=3 * 2**20, d=260)
    monkeypatch.setattr(experiment, "traced_cost", lambda *names: record)


def test_a_run_that_does_not_fit_is_not_started(plan, traced, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "build_model", no_room)  # it would be seen
        records = run_specs(limited(plan, "2MB"), plan.specs(HEAD))
    assert [record.outcome for record in records] == ["does_not_fit"] * 2
    first = records[0]
    assert first.summary.predicted_bytes == 3 * 2**20 and first.summary.d == 260
    assert "needs 0.00 GiB by its trace" in first.message and "start_unfit" in first.message
    assert run_specs(limited(plan, "2MB"), plan.specs(HEAD)) == records


def test_a_switch_or_a_larger_device_starts_it(plan, traced):
    (spec, _) = plan.specs(HEAD)
    small = limited(plan, "2MB")
    assert run_specs(small, [spec])[0].outcome == "does_not_fit"
    (record,) = run_specs(small, [spec], force=True)
    assert record.outcome == "completed" and record.summary.predicted_bytes == 3 * 2**20
    (other,) = plan.specs(HEAD._replace(method="bp_checkpointing"))[:1]
    assert run_specs(small, [other])[0].outcome == "does_not_fit"
    assert run_specs(limited(plan, "1MB"), [other])[0].outcome == "does_not_fit"
    assert run_specs(limited(plan, "4MB"), [other])[0].outcome == "completed"
    (third,) = plan.specs(HEAD._replace(method="zo_vanilla"))[:1]
    assert run_specs(limited(plan, "2MB", start_unfit=True), [third])[0].outcome == "completed"


def test_a_memory_needs_a_unit(costbp, workdir):
    (workdir / "more.yaml").write_text(yaml.safe_dump({"resources": {"memory": "24"}}))
    done = costbp("validate", "-c", "more.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "more.yaml: resources.memory = '24'" in done.stderr and "as 24GB" in done.stderr


def test_a_report_of_runs_of_which_some_had_no_room(plan, monkeypatch):
    """Runs without a single step or evaluation stand in the report, and are compared with none."""
    cells = [c for c in plan.cells() if c.model == "tiny_head"]
    blocks = tuple(b for b in plan.study.experiments if "tiny_head" in b.models)
    plan = plan.model_copy(
        update={"study": plan.study.model_copy(update={"experiments": blocks, "seeds": (0,)})}
    )
    entry = dict.fromkeys(("forward_units", "closed_form", "flops", "forward_flops"), 2.0)
    entry |= dict.fromkeys(("peak_bytes", "state_bytes", "weights_bytes", "batch", "seq"), 1)
    entry |= {"peak_by_category": {"weights": 1}, "d": 1}
    entries = [entry | dict(zip(("model", "task", "method"), c, strict=False)) for c in cells]
    write_json(
        plan.results / "cost/tiny_head/docstrings.json", [e | {"device": "meta"} for e in entries]
    )
    for without in (["fmad_multiple"], ["fmad_multiple", "bp_checkpointing"]):
        for cell in cells:
            with monkeypatch.context() as patch:
                if cell.method in without:
                    patch.setattr(Scorer, "__call__", no_room)  # before the first step
                run_specs(plan, plan.specs(cell))
        found = frames.collect(plan)
        frames.save(found, plan.results)
        found = frames.load(plan.results)
        assert set(unusual(found)["outcome"]) == {"out_of_memory"}
        reports = plan.study.paths.reports
        draw(plan, found, reports / "figures")
        tabulate(plan, found, reports / "tables")
        write_claims(plan, found, reports)
        write_page(plan, found, reports)
        page = (reports / "index.html").read_text()
        assert "out_of_memory" in page and "CUDA out of memory" in page
        assert "FmAD-Multiple: out of memory" in (reports / "claims.md").read_text()
        for cell in cells:  # the second time both are without room
            for spec in plan.specs(cell):
                (spec.folder(plan.study.paths.store) / "record.json").unlink()


def test_a_gpu_study_on_a_card_too_small_has_a_report(tmp_path):
    """Every run refused by its trace, and the page says so."""
    with shortened(tmp_path):
        plan, words = lay_over("gpu-demo")
        Path("small.yaml").write_text(yaml.safe_dump({"resources": {"memory": "1KB"}}))
        run_jobs(*words, "small.yaml", without=("track",))
        page = (plan.study.paths.reports / "index.html").read_text()
        assert page.count("does_not_fit") >= len(list(plan.cells()))
        cell = next(iter(plan.cells()))
        needed = traced_cost(plan, *cell[:3]).bytes
        record = read_record(plan.specs(cell)[0].folder(plan.study.paths.store))
        assert record.summary.predicted_bytes == needed > 1024
