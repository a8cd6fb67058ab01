"""The package on a pretended GPU: every method, whole runs of every kind of task, runs taken up again,
how often a step waits, masks on a second device; and mistakes that only a device shows, made on purpose.

The CPU's numbers are those of a ``Plain`` block, in which torch takes the derivative formulas that it
takes for the pretended GPU: then all is bit-equal. The tests run in one process of their own (see
``pretended_gpu``); in a debugger, set PRETENDED_GPU and give pytest ``-n 0``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.families import FAMILIES
from costbp import device as measured
from costbp.config import Cell, load_plan
from costbp.config.load import overlaid
from costbp.data import encoded
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.errors import UserError
from costbp.estimators import Estimate, calibrated, directions, memory_plans, replay
from costbp.estimators.backprop import Backprop
from costbp.estimators.memory_plans import PLANS
from costbp.meter import Meter
from costbp.models.build import build_model
from costbp.objective import Batch, Key, Objective
from costbp.tasks import docstrings
from costbp.train import experiment
from costbp.train.loop import Run
from costbp.train.record import STEPS
from tests.conftest import ROOT, working_copy
from tests.pretended_gpu import BYTES, Mixed, backend, install
from tests.pretended_steps import Plain, methods, moved, unasked
from tests.test_standins import BY_EXAMPLE, KINDS, draw_easy_vqa

INSIDE = "PRETENDED_GPU" in os.environ
CPU = torch.device("cpu")
GPU, SECOND = install() if INSIDE else (CPU, CPU)


def apart(test: Any) -> Any:
    """A test that runs in the process which has the devices, and here tells how it ended."""
    if INSIDE:
        return test

    def asked(outcomes: dict[str, list[str]]) -> None:
        assert not outcomes[test.__name__], "\n\n".join(outcomes[test.__name__])

    return asked


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, list[str]]:
    """What went wrong in each test of this file that was asked for."""
    found = tmp_path_factory.mktemp("pretended") / "found.xml"
    tests = [item.name for item in request.session.items if item.path == Path(__file__)]
    command = [sys.executable, "-m", "pytest", "-n", "0", f"--junit-xml={found}"]
    command += [f"{__file__}::{test}" for test in tests]
    environment = os.environ | {"PRETENDED_GPU": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.exists(), done.stdout + done.stderr
    ended = defaultdict(list)
    for case in ElementTree.parse(found).iter("testcase"):
        wrong = [part.text or "" for part in case if part.tag in ("failure", "error")]
        ended[case.get("name", "").partition("[")[0]] += wrong
    return dict(ended)


def three_steps(objective: Objective, batch: Batch, method: Any) -> tuple[list[Any], list[str]]:
    """Figures and theta after each step; and where the host waited for a device."""
    estimator = method.build()
    optimizer = method.optimizer.build(objective.theta)
    found, waits = [], []
    for step in range(3):
        backend.waits.clear()
        batches = [batch] * len(estimator.passes(step))
        estimate = estimator.estimate(objective, batches, Key(0, step))
        objective.theta.grad = estimate.gradient
        optimizer.step()
        figures = estimate.figures
        waits += unasked(backend.waits)
        found.append((figures.tolist(), objective.theta.tolist()))
    return found, waits


@apart
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_takes_the_steps_that_it_takes_on_the_cpu(family):
    here, there = (moved(family, device) for device in (CPU, GPU))
    start = here[0].theta.clone()
    for name, method in methods().items():
        if family == "qwen2_vl" and name in BY_EXAMPLE:
            continue  # its batches hold patches of images
        with Plain():
            wanted, _ = three_steps(*here, method)
        found, waits = three_steps(*there, method)
        assert str(found) == str(wanted), name  # nan is nan
        # a budget of bytes is fitted by metered steps before the first
        asked = [place for place in waits if "/costbp/meter.py" not in place]
        if family in ("opt", "llama"):
            assert not asked, name
        assert all("/transformers/" in place for place in asked), (name, asked)
        for objective, _ in (here, there):
            objective.theta.copy_(start)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Each kind of task with few examples of few lengths, and a budget of three steps."""
    size = {"batch_size": 2, "validation": 4, "test": 4, "train": 24}
    short = ("docstrings", "name_fits")
    tasks = {t: {**size, "max_length": 60 if t in short else 176} for _, t in KINDS.values()}
    entries = {"tasks": tasks, "budgets": {"three": {"label": "three steps", "steps": 3}}}
    folder = working_copy(tmp_path_factory.mktemp("pretended"))
    draw_easy_vqa(folder / "cache/assets/easy_vqa")
    small = yaml.safe_dump({"entries": entries, "evaluation": {"points": [1]}})
    (folder / "small.yaml").write_text(small)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "PAD_TO", 64)
        patch.setattr(docstrings, "PER_CLASS", 30)
        plan = load_plan([Path("small.yaml")])
        models, packed = plan.catalog.models, {"source.bits": 4, "source.group": 16}
        models["tiny_packed"] = overlaid(models["tiny_decoder"], packed, "test")
        plan.catalog.methods.update(methods())
        for pair in KINDS.values():
            prepare(Pair.of(plan, *pair))
        gc.freeze()  # each run looks for garbage, and what was imported is none
        yield plan


def spec_of(plan, kind, method, steps=3):
    spec = plan.spec(Cell(*KINDS[kind], method, "three"), 0)
    return spec.model_copy(update={"budget": spec.budget.model_copy(update={"steps": steps})})


def recorded(plan, spec, device, *, test=False):
    """A run's record, and its figures and steps but for times, the process' size, and what the
    allocator tells; the store forgets it."""
    with pytest.MonkeyPatch.context() as patch, Plain() if device == CPU else patch.context():
        patch.setattr(experiment, "device_slot", lambda wanted: contextlib.nullcontext(device))
        (record,) = experiment.run_specs(plan, [spec], test=test)
    folder = spec.folder(plan.study.paths.store)
    rows = [record.summary.figures(), *pq.read_table(folder / STEPS).to_pylist()]
    shutil.rmtree(folder)
    other = ("seconds", "rss_bytes", "allocated_bytes", "reserved_bytes")
    return record, [{k: v for k, v in row.items() if not k.endswith(other)} for row in rows]


@apart
@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs_are_those_of_the_cpu(plan, kind):
    """Settled differences, training, evaluation, test scores both ways, and all that is recorded."""
    reverse = "bp_checkpointing" if list(KINDS).index(kind) % 2 else "bp_selective"
    for method in (reverse, "fmad_multiple", "zo_vanilla"):
        test, spec = method == reverse, spec_of(plan, kind, method)
        _, wanted = recorded(plan, spec, CPU, test=test)
        record, found = recorded(plan, spec, GPU, test=test)
        assert record.outcome == "completed" and found == wanted, method
        assert record.environment["device"] == "pretended GPU 0"
        summary = record.summary
        assert summary.steps == 3 and (summary.test_accuracy is not None) == test
        assert (summary.difference_snr is not None) == (method == "zo_vanilla")
        held = summary.weights_bytes + summary.state_bytes + summary.peak_bytes
        assert held < summary.allocated_bytes < 1.3 * held, method


def run_of(plan, kind, method, steps) -> Run:
    spec, data = (
        spec_of(plan, kind, method, steps),
        load_prepared(prepare(Pair.of(plan, *KINDS[kind]))),
    )
    module = build_model(spec.model, len(data.names), Path("none"), 0, data.width, GPU)
    return Run(spec, module, data, GPU)


def waits_of(run: Run) -> list[list[str]]:
    """Where the host waited from one step's end to the next, but for steps that count the cost of a
    new kind of step."""
    found, known = [], [0]

    def watch(progress):
        known.append(len(run.cost_of._known))
        if known[-1] == known[-2]:
            found.append(unasked(backend.waits))
        backend.waits.clear()

    run.train(watch)
    assert len(found) > 1
    return found


def once(places: list[str]) -> bool:
    return len(places) == 1 and "costbp/train/loop.py" in places[0]


@apart
@pytest.mark.parametrize("kind", ["features", "numbers"])
def test_a_step_waits_once(plan, kind):
    for method in methods() if kind == "features" else ("bp_selective", "zo_svrg"):
        waits = waits_of(run_of(plan, kind, method, 5))
        assert all(map(once, waits)), (method, waits)


@apart
def test_a_run_that_was_stopped_continues_bit_equal(plan, monkeypatch):
    plain, stopping = Run.step, []

    def step(self, *args):
        found = plain(self, *args)
        if self.state.step == 5 and stopping:
            signal.raise_signal(stopping.pop())
        return found

    monkeypatch.setattr(Run, "step", step)
    for method in ("bp_checkpointing", "zo_svrg", "fmad_sparse", "zo_adaptive", "hizoo"):
        spec = spec_of(plan, "features", method, 9)
        _, (figures, *steps) = recorded(plan, spec, GPU)
        stopping.append(signal.SIGINT)
        with pytest.raises(UserError, match="interrupted at step 5"):
            recorded(plan, spec, GPU)
        _, found = recorded(plan, spec, GPU)
        assert found == [figures | {"resumed": 1}, *steps], method


def half_way(plan, method, path) -> Run:
    """A new run that goes on where another was after three steps."""
    first, run = (run_of(plan, "features", method, steps) for steps in (3, 8))
    first.train(lambda progress: None)
    torch.save({**first.state_dict(), "hash": run.spec.hash}, path)
    run.load_state_dict(torch.load(path, map_location=GPU, weights_only=True))
    return run


@apart
@pytest.mark.parametrize("method", ["bp_checkpointing", "zo_adam"])
def test_a_run_that_continues_waits_once(plan, method, tmp_path):
    waits = waits_of(half_way(plan, method, tmp_path / "checkpoint.pt"))
    assert all(map(once, waits)), waits


def masked(plan: str) -> list[float]:
    """A gradient under dropout by a plan for memory, on the second device."""
    objective, batch = moved("bert", SECOND, layers=6, dropout=0.3)
    with torch.autograd.set_multithreading_enabled(False):
        return Backprop(PLANS[plan]).estimate(objective, [batch], Key(1, 0)).gradient.tolist()


@apart
def test_on_a_second_device_masks_are_drawn_again_as_they_were(monkeypatch):
    wanted = masked("none")
    for plan in PLANS:
        assert masked(plan) == wanted, plan
    fresh = functools.partial(memory_plans.checkpoint, preserve_rng_state=False)
    monkeypatch.setattr(memory_plans, "checkpoint", fresh)
    assert masked("per_block") != wanted
    monkeypatch.setattr(replay, "set_device_states", lambda *given, **options: None)
    assert masked("sub_layer") != wanted


@apart
def test_what_is_offloaded_is_not_on_the_device():
    objective, batch = moved("llama", GPU, layers=6)
    peaks = {}
    for plan in ("none", "offload"):
        with Meter([*objective.existing(), *batch.values()]) as meter:
            Backprop(PLANS[plan]).estimate(objective, [batch], Key(1, 0))
        peaks[plan] = meter.peak
    assert peaks["offload"] < 0.6 * peaks["none"]


@apart
def test_what_a_device_tells():
    assert measured.memory_of(SECOND) == BYTES and measured.name_of(SECOND) == "pretended GPU 1"
    measured.free(SECOND)
    measured.forget_peaks(SECOND)
    (before, _), other = measured.allocator_peaks(SECOND), measured.allocator_peaks(GPU)
    one = torch.ones(2**18, device=SECOND)
    one = one + one
    assert measured.allocator_peaks(SECOND) == (before + 2**21, before + 2**21)
    measured.forget_peaks(SECOND)
    assert measured.allocator_peaks(SECOND) == (before + 2**20, before + 2**20)
    assert measured.allocator_peaks(GPU) == other
    backend.waits.clear()
    measured.synchronise(one.device)
    assert len(backend.waits) == 1 and "costbp/device.py" in backend.waits[0]


@apart
def test_random_numbers_of_a_device_are_its_own():
    drawn = lambda device: torch.rand(3, device=device).tolist()  # noqa: E731
    torch.manual_seed(3)
    numbers = [drawn(SECOND) for _ in range(3)]
    assert drawn(SECOND) not in numbers
    assert drawn(GPU) == numbers[0] == drawn(CPU)  # seeded alike


# --- mistakes ------------------------------------------------------------------------------------


@apart
def test_what_a_device_refuses_and_what_it_waits_for():
    there, here, index = torch.ones(3, device=GPU), torch.ones(3), torch.tensor([0, 1])
    pinned = torch.empty_like(there, device="cpu", pin_memory=True)
    for mistake in (
        lambda: there + here,
        lambda: there + torch.ones(3, device=SECOND),
        lambda: torch.stack([there[0], torch.tensor(1.0)]),
        lambda: torch.tensor(1.0).add_(there[0]),
        lambda: here[index.to(GPU)],
        lambda: torch.rand(3, device=GPU, generator=torch.Generator()),
    ):
        with pytest.raises(Mixed):
            mistake()
    free = (
        lambda: there * torch.tensor(2.0),
        lambda: here.to(GPU, non_blocking=True),
        lambda: pinned.copy_(there, non_blocking=True),
    )
    dear = (
        lambda: float(there[0]),
        lambda: bool(there[0] > 0),
        lambda: there.tolist(),
        lambda: there.cpu(),
        lambda: here.to(GPU),
        lambda: torch.empty(3).copy_(there, non_blocking=True),  # not pinned
        lambda: torch.equal(there, there),
        lambda: there.nonzero(),
        lambda: there[index],
    )
    for place, call in enumerate(free + dear):
        backend.waits.clear()
        call()
        assert len(backend.waits) == (place >= len(free)), place


@apart
def test_a_tensor_of_the_hosts_in_an_estimator_is_seen(plan, monkeypatch):
    plain = directions.independent
    mistaken = lambda *args: lambda k, name: plain(*args)(k, name).cpu()  # noqa: E731
    monkeypatch.setattr(directions, "independent", mistaken)
    monkeypatch.setattr(calibrated, "independent", mistaken)
    for method in ("zo_sparse", "fmad_adaptive"):
        with pytest.raises(Mixed):
            run_of(plan, "features", method, 1).train(lambda progress: None)
    for method in ("zo_vanilla", "fmad_multiple"):  # torch copies it, and the host waits for that
        assert not any(map(once, waits_of(run_of(plan, "features", method, 5))))


@apart
def test_a_number_read_in_a_step_is_counted(plan, monkeypatch):
    plain = Estimate.figures.fget
    careless = property(lambda self: (self.loss.item(), plain(self))[1])
    monkeypatch.setattr(Estimate, "figures", careless)
    for places in waits_of(run_of(plan, "features", "zo_vanilla", 5)):
        assert not once(places) and any(__file__ in place for place in places)


@apart
def test_a_state_that_a_checkpoint_leaves_with_the_host_is_seen(plan, monkeypatch, tmp_path):
    plain = directions.Sparse.load_state_dict
    left = lambda self, state: plain(self, {k: v.cpu() for k, v in state.items()})  # noqa: E731
    monkeypatch.setattr(directions.Sparse, "load_state_dict", left)
    with pytest.raises(Mixed):
        half_way(plan, "zo_sparse", tmp_path / "checkpoint.pt").train(lambda progress: None)
