"""Counted cost against hand counts and closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from costbp.config import load_plan
from costbp.estimators import build_estimator
from costbp.estimators.memory_plans import PLANS
from costbp.measure.meter import Meter
from costbp.measure.step import CostCounter
from costbp.models.build import Head, build_model
from costbp.objective import Key, Objective
from costbp.theory.cost import forward_units
from costbp.train.loop import cross_entropy
from tests.conftest import ROOT

UNITS = {  # products of one linear layer whose input needs no gradient
    "bp_vanilla": 2,
    "bp_checkpointing": 2,
    "bp_accumulate": 8,
    "fmad_vanilla": 2,
    "fmad_multiple": 9,
    "zo_vanilla": 2,
    "zo_multiple": 16,
}


@pytest.mark.parametrize("name", UNITS)
def test_flops_of_a_head_equal_the_hand_count(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = Objective(Head(32, 5), cross_entropy)
    estimator = build_estimator(load_plan().catalog.methods[name])
    data = [{"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}]
    cost = CostCounter(estimator)(objective, data * estimator.batches_per_step, Key(0, 0))
    assert cost.forward_flops == 2 * 8 * 32 * 5
    assert cost.flops == UNITS[name] * cost.forward_flops


def encoder(catalog, layers=2):
    """The tiny encoder's objective and a batch of 4 x 16 tokens."""
    entry = catalog.models["tiny_lora"]
    config = dict(entry.source.config) | {"num_hidden_layers": layers}
    entry = entry.model_copy(update={"source": entry.source.model_copy(update={"config": config})})
    module = build_model(entry, 4, Path("unused"), seed=0, width=0)
    ids = torch.randint(3, 2000, (4, 16))
    data = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.zeros(4).long(),
    }
    return Objective(module, cross_entropy), data


@pytest.mark.parametrize("name", UNITS)
def test_flops_equal_those_of_torch_s_counter(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    objective, data = encoder(catalog)
    estimator = build_estimator(catalog.methods[name])
    batches = [data] * estimator.batches_per_step
    with FlopCounterMode(display=False) as counter:
        estimator.estimate(objective, batches, Key(0, 0))
    assert CostCounter(estimator)(objective, batches, Key(0, 0)).flops == counter.get_total_flops()


def test_checkpointing_saves_what_the_recomputed_blocks_would_keep(monkeypatch):
    """Against torch's own account of what is saved for backward, not against our meter."""
    monkeypatch.chdir(ROOT)
    catalog = load_plan().catalog
    peaks, saved = {}, {}
    for name in ("bp_vanilla", "bp_checkpointing"):
        objective, data = encoder(catalog, layers=8)
        method = catalog.methods[name]
        peaks[name] = CostCounter(build_estimator(method))(objective, [data], Key(0, 0)).peak_bytes
        existing = {t.untyped_storage().data_ptr() for t in objective.module.parameters()}
        kept = {}

        def pack(tensor, existing=existing, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in existing:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, PLANS[method.estimator.plan](objective.module):
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
    objective, data = encoder(catalog)
    estimator = build_estimator(catalog.methods[name])
    cost = CostCounter(estimator)(objective, [data] * estimator.batches_per_step, Key(0, 0))
    expected = forward_units(catalog.methods[name])
    if name == "bp_checkpointing":  # the last of two blocks is kept: half of the recomputation
        expected = 2.5
    # below the first adapters nothing has a tangent or a gradient: a tenth of two layers
    assert cost.units == pytest.approx(expected, rel=0.12)
    assert cost.peak_bytes > 0


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
