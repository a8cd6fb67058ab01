"""Counted cost against hand counts and closed form."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from costbp.config import load_plan
from costbp.config.shares import Shares
from costbp.cost.step import CostCounter, measure_step
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import Gaussian
from costbp.estimators.memory_plans import PLANS, blocks
from costbp.estimators.oracles import Central
from costbp.estimators.projected import Projected
from costbp.estimators.variance import Accumulate
from costbp.meter import Meter
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from tests.conftest import ROOT

UNITS = {  # products of one linear layer whose input needs no gradient, by step
    "bp_vanilla": {0: 2},
    "bp_checkpointing": {0: 2},  # a lone layer stores nothing but its input
    "bp_selective": {0: 2},
    "bp_sublayer": {0: 2},
    "bp_byte_budget": {0: 2},
    "bp_accumulate": {0: 4 * 2},
    "fmad_vanilla": {0: 2},
    "fmad_accumulate": {0: 4 * 2},
    "fmad_multiple": {0: 1 + 8},
    "fmad_adaptive": {0: (1 + 2) + 2, 1: 2, 49: 2, 50: (1 + 2) + 2},  # two probes of one group
    "fmad_svrg": {0: 8 * 2, 1: 2 * 2, 24: 2 * 2, 25: 8 * 2},
    "fmad_sparse": {0: 2, 50: 2},
    "zo_vanilla": {0: 2},
    "zo_accumulate": {0: 4 * 2},
    "zo_multiple": {0: 8 * 2},
    "zo_adaptive": {0: 2 * 2 + 2, 1: 2, 49: 2, 50: 2 * 2 + 2},
    "zo_svrg": {0: 8 * 2, 1: 2 * 2, 24: 2 * 2, 25: 8 * 2},
    "zo_sparse": {0: 2, 50: 2},
    # beyond the study
    "fzoo": {0: 1 + 8},
    "zo_sign": {0: 8 * 2},
    "zo_adam": {0: 2},
    "lozo": {0: 2 + 2 / 8},  # U V^T of rank 2 once, where the batch has 8 rows
    "hizoo": {0: 3},
    "zo_per_example": {0: 2},
    "fmad_per_example": {0: 2},
    "zo_many": {0: 1 + 32},
    "zo_nodes": {0: 2 + 1},  # and the weights' gradient
    "fmad_guess": {0: 2 + 2},  # one guess by backpropagation, one derivative along it
}


def test_the_table_covers_the_catalog():
    assert set(UNITS) == set(load_plan(base=ROOT / "config/config.yaml").catalog.methods)


@pytest.mark.parametrize("name", UNITS)
def test_flops_of_a_head_equal_the_hand_count(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = Objective(Head(32, 5), cross_entropy)
    estimator = load_plan().catalog.methods[name].build()
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    count = CostCounter(estimator)
    for step, units in UNITS[name].items():
        cost = count(objective, [data] * len(estimator.passes(step)), Key(0, step))
        assert cost.forward_flops == 2 * 8 * 32 * 5
        assert cost.flops == units * cost.forward_flops, step


def encoder(catalog, layers=2, rows=4):
    """The tiny encoder's objective and a batch of rows x 16 tokens."""
    entry = catalog.models["tiny_lora"]
    config = dict(entry.source.config) | {"num_hidden_layers": layers}
    entry = entry.model_copy(update={"source": entry.source.model_copy(update={"config": config})})
    module = build_model(entry, 4, Path("unused"), seed=0, width=0)
    ids = torch.randint(3, 2000, (rows, 16))
    data = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(rows).long(),
    }
    return Objective(module, cross_entropy), data


aten = torch.ops.aten
DIFFERENT = ("bp_vanilla", "bp_checkpointing", "bp_accumulate", "fmad_vanilla", "fmad_multiple")
DIFFERENT += ("zo_vanilla", "zo_multiple", "zo_adaptive", "zo_svrg", "hizoo")


FLASH = {  # the fused kernel of CPUs, by torch's formulas of that of GPUs
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(
        *shapes[:3]
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_flops_equal_those_of_torch_s_counter(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    objective, data = encoder(catalog)
    estimator = catalog.methods[name].build()
    count = CostCounter(estimator)
    for step in (0, 1):
        batches = [data] * len(estimator.passes(step))
        with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            estimator.estimate(objective, batches, Key(0, step))
        flops = count(objective, batches, Key(0, step)).flops
        assert flops == counter.get_total_flops(), step


@pytest.mark.parametrize("name", ["fmad_adaptive", "zo_svrg", "zo_sparse", "hizoo"])
def test_counting_leaves_the_estimator_and_theta_as_they_were(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = Objective(Head(32, 5), cross_entropy)
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    estimator = load_plan().catalog.methods[name].build()
    count = CostCounter(estimator)
    for step in range(3):
        batches = [data] * len(estimator.passes(step))
        before = {k: v.clone() for k, v in estimator.state_dict().items()}
        theta = objective.theta.clone()
        count(objective, batches, Key(0, step))
        count(objective, batches, Key(0, step + 50))
        after = estimator.state_dict()
        assert before.keys() == after.keys() and bool(before) == (step > 0)
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert torch.equal(objective.theta, theta)
        estimator.estimate(objective, batches, Key(0, step))


def test_batches_of_another_shape_are_counted_anew():
    objective = Objective(Head(32, 5), cross_entropy)
    count = CostCounter(Accumulate(Backprop(PLANS["none"]), 2))
    sizes = (8, 2)
    batches = [
        {"features": torch.randn(n, 32), "labels": torch.zeros(n, dtype=torch.long)} for n in sizes
    ]
    cost = count(objective, batches, Key(0, 0))
    assert cost.flops == 2 * sum(2 * n * 32 * 5 for n in sizes)
    assert cost.forward_flops == 2 * 5 * 32 * 5  # the mean batch
    assert cost.units == 4


def test_batched_sets_share_what_lies_below_the_first_adapter(monkeypatch):
    """Queries, keys and values of the first layer see no perturbed parameter but their adapters:
    8 sets need them once."""
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    objective, data = encoder(catalog)
    flops = {}
    for how in ("always", "never"):
        estimator = Projected(Central(1e-3, how), Gaussian(), 8)
        flops[how] = CostCounter(estimator)(objective, [data], Key(0, 0)).flops
    tokens, width = data["input_ids"].numel(), 64
    assert flops["never"] - flops["always"] == 2 * 7 * 3 * (2 * tokens * width * width)


def test_checkpointing_saves_what_the_recomputed_blocks_would_keep(monkeypatch):
    """Against torch's own account of what is saved for backward, not against our meter."""
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    peaks, saved = {}, {}
    for name in ("bp_vanilla", "bp_checkpointing"):
        objective, data = encoder(catalog, layers=8)
        method = catalog.methods[name]
        peaks[name] = CostCounter(method.build())(objective, [data], Key(0, 0)).peak_bytes
        existing = {t.untyped_storage().data_ptr() for t in objective.module.parameters()}
        kept = {}

        def pack(tensor, existing=existing, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in existing:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, PLANS[method.estimator.plan](objective, data):
            loss = objective.value(data)
        saved[name] = sum(kept.values())
        del loss
    spared = saved["bp_vanilla"] - saved["bp_checkpointing"]
    assert spared > 0.7 * saved["bp_vanilla"]
    # only one recomputed block is alive at a time beside the last, which was kept
    assert peaks["bp_vanilla"] - peaks["bp_checkpointing"] == pytest.approx(spared, rel=0.2)


@pytest.mark.parametrize("name", UNITS)
def test_units_of_an_encoder_are_near_the_closed_form(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    objective, data = encoder(catalog, rows=5)  # too many tokens to be batched by `auto`
    estimator = catalog.methods[name].build()
    count = CostCounter(estimator)
    costs = [
        count(objective, [data] * len(estimator.passes(step)), Key(0, step))
        for step in range(estimator.cycle)
    ]
    found = blocks(objective.module)
    shares = Shares(tensors=len(objective.slices), blocks=len(found))
    expected = catalog.methods[name].closed_form(shares)
    if name == "bp_checkpointing":  # the last of two blocks is kept: half of the recomputation
        expected = 2.5
    if name == "bp_byte_budget":  # both blocks fit: nothing is recomputed
        expected = 2
    # below the first adapters nothing has a tangent or a gradient: a tenth of two layers
    assert statistics.mean(cost.units for cost in costs) == pytest.approx(expected, rel=0.12)
    assert min(cost.peak_bytes for cost in costs) > 0


def test_a_wrapper_s_vectors_count_towards_the_peak(monkeypatch):
    monkeypatch.chdir(ROOT)
    methods = load_plan().catalog.methods
    objective = Objective(Head(32, 5), cross_entropy)
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    peaks = {}
    for name in ("zo_vanilla", "zo_accumulate", "zo_svrg"):
        estimator = methods[name].build()
        batches = [data] * len(estimator.passes(1))
        peaks[name] = CostCounter(estimator)(objective, batches, Key(0, 1)).peak_bytes
    vector = objective.theta.nbytes
    assert peaks["zo_accumulate"] == peaks["zo_vanilla"] + vector  # the sum
    assert peaks["zo_svrg"] == peaks["zo_vanilla"] + 2 * vector  # the estimate there, theta here


def test_peak_memory_follows_lifetimes():
    with Meter() as memory:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a + 1
        view = b.view(10, 100)
        del a
        c = view * 2
        del b, view, c
        assert memory.live == 0
    assert memory.peak == 8000


def test_peak_memory_ignores_what_was_there():
    weight = torch.zeros(1000)
    with Meter([weight]) as memory:
        weight.view(10, 100).t()
    assert memory.peak == 0


@pytest.mark.parametrize("name", ["bp_vanilla", "fmad_svrg", "zo_adaptive"])
def test_time_is_the_mean_over_the_cycle_as_flops_are(name, monkeypatch):
    """A clock that shows FLOPs: then a step's time in forwards is its forward units."""
    monkeypatch.chdir(ROOT)
    method = load_plan().catalog.methods[name]
    objective = Objective(Head(32, 5), cross_entropy)
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}

    def flops(run, device):
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops())

    monkeypatch.setattr("costbp.cost.step.median_seconds", flops)
    optimizer = method.optimizer.build(objective.theta)
    cost = measure_step(objective, method.build(), optimizer, data, timed=True)
    assert cost.seconds / cost.forward_seconds == pytest.approx(cost.forward_units)
    assert cost.forward_units == pytest.approx(method.closed_form(Shares(tensors=2)))
    assert cost.peak_bytes > 0 and cost.state_bytes >= 2 * objective.theta.nbytes
