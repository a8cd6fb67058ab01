"""Memory ceilings: batches in parts give the whole batch's numbers, and the cheapest arrangement that
fits is found."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.families import FAMILIES
from costbp.config import Cell, load_plan
from costbp.config.catalog import BudgetEntry
from costbp.config.optimizer import OptimizerSpec
from costbp.cost.ceiling import Arrangement, search, traced_arrangement
from costbp.cost.step import measure_step
from costbp.data.pairs import Pair
from costbp.data.prepare import prepare
from costbp.estimators.backprop import Backprop
from costbp.estimators.calibrated import Calibrated
from costbp.estimators.clipping import Clipped
from costbp.estimators.directions import Gaussian, Sparse
from costbp.estimators.guess import LocalGuess
from costbp.estimators.hessian_informed import HessianInformed
from costbp.estimators.memory_plans import keep_all, per_block
from costbp.estimators.oracles import Central, Exact, OneSided
from costbp.estimators.projected import Projected
from costbp.estimators.variance import SVRG, Accumulate
from costbp.models.loss import cross_entropy, error_rate, micro_batches
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from costbp.train import experiment
from costbp.train.experiment import run_specs
from tests.conftest import Lift64, working_copy
from tests.small import Network, examples, in_dtype, network, small_model

KEY = Key(3, 5)
SGD = OptimizerSpec(name="sgd", lr=1e-2)
EPS = 0.1  # of a difference whose rounding doesn't matter

ESTIMATORS = {
    "bp": lambda: Backprop(keep_all),
    "bp, per block": lambda: Backprop(per_block),
    "fmad": lambda: Projected(Exact(), Gaussian(), 3),
    "fmad in chunks": lambda: Projected(Exact(2), Gaussian(), 3),
    "fmad, calibrated": lambda: Projected(Exact(), Calibrated(2, 2, 50, "scale")),
    "fmad, largest of calibrated": lambda: Projected(Exact(), Calibrated(2, 2, 50, "largest")),
    "zo": lambda: Projected(Central(EPS, "never"), Gaussian(), 3),
    "zo, batched": lambda: Projected(Central(EPS, "always"), Gaussian(), 3),
    "zo, sparse": lambda: Projected(Central(EPS), Sparse(0.5, 5)),
    "zo, by examples": lambda: Projected(Central(EPS), Gaussian(), 2, groups="examples"),
    "fmad, two groups": lambda: Projected(Exact(), Gaussian(), 2, groups=2),
    "zo by its spread": lambda: Projected(OneSided(EPS), Gaussian(), 3, "spread", 0.05),
    "hizoo": lambda: HessianInformed(Central(EPS), 0.5),
    "fmad, signs": lambda: Clipped(Projected(Exact(), Gaussian(), 2), 0.1, True),
    "zo, accumulated": lambda: Accumulate(Projected(Central(EPS), Gaussian()), 2),
    "fmad, svrg": lambda: SVRG(Projected(Exact(), Gaussian()), 5, 2),
}


@contextlib.contextmanager
def parts(objective, rows):
    objective.split = partial(micro_batches, rows=rows)
    yield
    objective.split = None


def estimates(estimator, objective, batch):
    """Numbers of two steps: what the first learns from its batch shows in the second."""
    found = []
    for step in (5, 6):
        batches = [batch] * len(estimator.passes(step))
        estimate = estimator.estimate(objective, batches, Key(3, step))
        found += [estimate.gradient.clone(), estimate.loss, estimate.derivatives]
    return torch.cat([part.reshape(-1) for part in found])


def rows_of(family, count):
    """A model, and a batch of examples that count differing numbers of tokens."""
    objective, _ = small_model(family)
    _, two = small_model(family)
    batch = {
        name: torch.cat([value] * count)[: len(value) * count // 2] for name, value in two.items()
    }
    if batch["labels"].ndim > 1:
        for row, labels in enumerate(batch["labels"]):
            labels[: 1 + row] = -100
    return objective, batch


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_batch_in_parts_gives_the_numbers_of_the_whole(name, rows):
    objective, batch = network(), examples(5)
    whole = estimates(ESTIMATORS[name](), objective, batch)
    assert ESTIMATORS[name]().per_batch.divisible
    with parts(objective, rows):
        split = estimates(ESTIMATORS[name](), objective, batch)
    assert torch.linalg.norm(split - whole) <= 1e-12 * torch.linalg.norm(whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["bp", "fmad", "zo"])
def test_parts_of_a_text_count_by_their_tokens(family, name):
    objective, batch = rows_of(family, 4)
    with Lift64():
        whole = estimates(ESTIMATORS[name](), objective, batch)
        with parts(objective, 3):
            split = estimates(ESTIMATORS[name](), objective, batch)
    assert torch.linalg.norm(split - whole) <= 1e-12 * torch.linalg.norm(whole)


def test_parts_have_their_own_images():
    grids = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 4], [1, 6, 2]])
    patches = torch.arange(4 + 8 + 8 + 12.0).unsqueeze(1)
    labels = torch.full((4, 3), -100)
    labels[0, 1:], labels[1, 2], labels[2, 2], labels[3, 0] = (
        7,
        7,
        7,
        7,
    )  # the first place is no next
    batch = {"pixel_values": patches, "image_grid_thw": grids, "labels": labels}
    (first, one), (second, two) = micro_batches(batch, 3)
    assert [len(one["pixel_values"]), len(two["pixel_values"])] == [20, 12]
    assert torch.equal(torch.cat([one["pixel_values"], two["pixel_values"]]), patches)
    assert [float(first), float(second)] == [1.0, 0.0]


def test_a_task_put_to_its_own_objective_is_divided_too():
    """The error rate of a batch is the mean of its examples', as the loss is."""
    objective, batch = Objective(network().module, error_rate), examples(5)
    whole = objective.value(batch)
    with parts(objective, 2):
        assert objective.value(batch) == pytest.approx(float(whole), rel=1e-6)
    assert 0 < whole < 1


@pytest.mark.parametrize("plan", [keep_all, per_block])
def test_every_pass_of_an_estimate_draws_a_part_s_own_masks(plan):
    objective, batch = small_model("bert", dropout=0.3)
    batch = {
        name: torch.cat([value, value]) for name, value in batch.items()
    }  # alike but for masks
    directions = Gaussian().draw(objective, KEY, 3)
    with Lift64(), parts(objective, 2):
        gradient = Backprop(plan).estimate(objective, [batch], KEY).gradient.clone()
        with objective.noise(KEY):
            loss, derivatives = Exact()(objective, batch, directions)
            once = [t.detach() for t in objective._terms(batch, objective._plain)]
    torch.testing.assert_close(derivatives, directions.dense @ gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, sum(once), rtol=1e-12, atol=0)
    assert abs(once[0] - once[1]) > 1e-6


@pytest.mark.parametrize("name", ["bp", "fmad", "fmad, calibrated", "zo, batched", "fmad, signs"])
def test_ways_give_the_same_numbers_at_rising_cost_and_falling_memory(name):
    objective, batch = small_model("bert", layers=3)
    with Lift64():
        ways = ESTIMATORS[name]().ways(objective)
        numbers = [estimates(way.estimator, objective, batch) for way in ways]
    assert len(ways) > 1
    for found in numbers[1:]:
        torch.testing.assert_close(found, numbers[0], rtol=1e-10, atol=1e-11)
    objective, batch = in_dtype(objective, batch, torch.float32)
    fresh = ESTIMATORS[name]().ways(objective)
    steps = [measure_step(objective, w.estimator, SGD.build(objective.theta), batch) for w in fresh]
    units, costs = [s.forward_units for s in steps], [way.cost for way in fresh]
    assert costs == sorted(costs) and units == sorted(units)
    assert steps[-1].peak_bytes < steps[0].peak_bytes


def test_a_guess_looks_at_whole_batches_in_chunks_of_its_directions():
    objective, batch = small_model("bert", layers=3)
    assert not LocalGuess(Exact()).divisible
    with Lift64():
        first, *more = [
            estimates(w.estimator, objective, batch) for w in LocalGuess(Exact()).ways(objective)
        ]
    assert len(more) == 2  # the model's blocks and its head: 4, 2, 1
    for found in more:
        torch.testing.assert_close(found, first, rtol=1e-10, atol=1e-12)


# --- the search --------------------------------------------------------------------------------


def budget(peak_memory):
    return BudgetEntry(label="few", steps=1, peak_memory=peak_memory)


def every(make, objective, batch, optimizer):
    """(forward units, micro-batches, place of the way, bytes) of every arrangement, the batch in all
    its parts."""
    found, examples = [], len(batch["labels"])
    for rows in (examples, examples // 2, 1):
        for place in range(len(make().ways(objective))):
            estimator = make().ways(objective)[place].estimator
            with parts(objective, rows) if rows < examples else contextlib.nullcontext():
                step = measure_step(objective, estimator, optimizer.build(objective.theta), batch)
            total = sum(step.peak_by_category.values())
            found.append((round(step.forward_units, 6), examples // rows, place, total))
    return found


@pytest.mark.parametrize("name", ["bp", "fmad", "zo, batched", "hizoo"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_cheapest_arrangement_that_fits_is_found(name, optimizer):
    objective, batch = small_model("llama", torch.float32, layers=3)
    batch = {key: torch.cat([value, value]) for key, value in batch.items()}
    theta, rule = objective.theta.clone(), OptimizerSpec(name=optimizer, lr=1e-3)
    with objective.returning():
        known = every(ESTIMATORS[name], objective, batch, rule)
    needs = sorted({entry[3] for entry in known})
    between = [(a + b) // 2 for a, b in itertools.pairwise(needs)]
    for ceiling in (needs[0], *between[::3], 2 * needs[-1]):
        fitting = [entry for entry in known if entry[3] <= ceiling]
        _, count, place, total = min(fitting)
        limit = budget(f"{(ceiling + 0.5) / 1024:.6f}KB")
        found = search(objective, ESTIMATORS[name](), rule, batch, limit)
        assert (found.way, found.bytes, found.fits) == (place, total, True), (ceiling, found)
        assert f"{count} micro-batches of {4 // count}" in found.text or count == 1
        assert (found.rows is None) == (count == 1)
        assert torch.equal(objective.theta, theta) and objective.split is None


def test_where_nothing_fits_the_smallest_need_is_named():
    objective, batch = small_model("llama", torch.float32, layers=3)
    known = every(ESTIMATORS["fmad"], objective, batch, SGD)
    found = search(objective, ESTIMATORS["fmad"](), SGD, batch, budget("1KB"))
    assert not found.fits and found.bytes == min(entry[3] for entry in known)
    assert "1 of 3 directions at a time, 2 micro-batches of 1" in found.message
    assert f"needs {found.bytes / 2**20:.2f} MiB" in found.message and "\n" not in found.message
    assert found.figures == {"ceiling_bytes": 1024, "arrangement": ""}


def test_inference_is_weights_and_the_peak_of_a_forward():
    """A linear layer's logits and their logarithms, of 8 x 5 numbers; the loss and its weight."""
    objective = Objective(Head(32, 5), cross_entropy)
    batch = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    inference = 4 * (objective.d + 2 * 8 * 5 + 1 + 1)
    for times in (1, 2.5):
        found = search(objective, Backprop(keep_all), SGD, batch, budget({"inference": times}))
        assert found.ceiling == int(times * inference)


def test_what_looks_across_a_batch_is_not_divided():
    class Normed(Network):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, batch):
            return super().forward({"features": self.norm(batch["features"])})

    batch = {"features": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    objective = Objective(Normed(), cross_entropy)
    found = search(objective, Backprop(keep_all), SGD, batch, budget("0.1KB"))
    assert found.rows is None and not found.fits


def test_backpropagation_in_micro_batches_needs_no_more_than_zeroth_order():
    """RoBERTa-base at 8 x 64 tokens by its trace: what docs/cost.md says."""
    from costbp.cost.bench import Bench

    plan = load_plan()
    bench, methods = Bench(plan.catalog.models["roberta_base"]), plan.catalog.methods
    zo = bench.cost("zo_vanilla", methods["zo_vanilla"], 8, 64)
    assert zo.beyond / 1e6 == pytest.approx(22.4, abs=0.1)
    data, method = bench.sample(8, 64), methods["bp_checkpointing"]
    bench.objective.split = partial(micro_batches, rows=2)
    micro = bench.cost("bp_checkpointing", method, 8, 64)
    bench.objective.split = None
    assert micro.beyond / 1e6 == pytest.approx(22.7, abs=0.1)
    with bench.tracing():
        ceiling = budget(f"{zo.bytes / 1024}KB")
        found = search(bench.objective, method.build(), method.optimizer, data, ceiling)
    assert found.text == "3 of 12 blocks kept, 8 micro-batches of 1"
    assert (found.bytes - zo.weights_bytes) / 1e6 == pytest.approx(22.0, abs=0.1)


# --- runs --------------------------------------------------------------------------------------

SMOKE = Path("config/studies/smoke.yaml")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = working_copy(tmp_path_factory.mktemp("ceiling"))
    with contextlib.chdir(folder):
        prepare(Pair.of(load_plan([SMOKE]), "tiny_lora", "docstrings"))
    return folder / "cache"


@pytest.fixture
def plan(workdir, cache):
    (workdir / "cache").mkdir()
    (workdir / "cache/prepared").symlink_to(cache / "prepared")
    return load_plan([SMOKE])


def run(plan, method, **limits):
    spec = plan.spec(Cell("tiny_lora", "docstrings", method, "units_96"), 0)
    (record,) = run_specs(plan, [spec.model_copy(update={"budget": spec.budget.model_copy(update=limits)})])  # fmt: skip
    return record


def all_bytes(summary):
    return summary.weights_bytes + summary.state_bytes + summary.peak_bytes


@pytest.mark.parametrize("method", ["bp_vanilla", "fmad_multiple", "zo_multiple", "fmad_svrg"])
def test_a_run_keeps_under_its_ceiling_and_learns_the_same(plan, method):
    free = run(plan, method).summary
    assert free.ceiling_bytes is None and free.arrangement == ""
    ceiling = all_bytes(free) - free.peak_bytes // 3
    record = run(plan, method, peak_memory=f"{ceiling / 1024:.4f}KB")
    tight = record.summary
    assert record.outcome == "completed" and record.hash != run(plan, method).hash
    assert all_bytes(tight) <= tight.ceiling_bytes == pytest.approx(ceiling, abs=1)
    assert "micro-batches of" in tight.arrangement or "at a time" in tight.arrangement
    assert tight.steps == free.steps
    assert tight.forward_units == pytest.approx(free.forward_units, rel=1e-3)
    assert tight.validation_loss == pytest.approx(free.validation_loss, rel=1e-3)


def test_a_run_that_nothing_fits_is_not_started(plan, monkeypatch):
    record = run(plan, "zo_vanilla", peak_memory="128KB")
    assert record.outcome == "does_not_fit" and record.summary.steps == 0
    assert record.summary.ceiling_bytes == 2**17 and record.summary.arrangement == ""
    assert "the ceiling is 0.12 MiB" in record.message and "micro-batches of 1" in record.message
    assert run(plan, "zo_vanilla", peak_memory="128KB") == record
    traced = Arrangement(way=0, rows=1, text="alone", bytes=3 * 2**20, ceiling=2**21, d=260)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "traced_arrangement", lambda *given: traced)
        patch.setattr(experiment, "build_model", None)  # it would be seen
        record = run(plan, "zo_vanilla", peak_memory="2MB")
    assert record.outcome == "does_not_fit" and "(alone) needs 3.00 MiB" in record.message
    summary = record.summary
    assert (summary.d, summary.ceiling_bytes, summary.predicted_bytes) == (260, 2**21, 3 * 2**20)


def test_a_model_with_a_configuration_is_arranged_by_its_trace(plan, monkeypatch):
    small = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 128}
    entry = plan.catalog.models["bert_base"]
    source = entry.source.model_copy(update={"config": entry.source.config | small})
    models = plan.catalog.models | {"bert_base": entry.model_copy(update={"source": source})}
    plan = plan.model_copy(update={"catalog": plan.catalog.model_copy(update={"models": models})})
    spec = plan.spec(Cell("bert_base", "docstrings", "bp_vanilla", "units_96"), 0)
    assert traced_arrangement(plan, spec) is None
    tight = spec.budget.model_copy(update={"peak_memory": {"inference": 1.1}})
    spec = spec.model_copy(update={"budget": tight})
    found = traced_arrangement(plan, spec)
    assert found is not None and found.fits
    with monkeypatch.context() as patch:
        patch.setattr("costbp.cost.ceiling.search", None)  # the cache has it
        assert traced_arrangement(plan, spec) == found
