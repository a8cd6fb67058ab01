"""Every estimator against reverse-mode autograd in float64, on a tiny encoder with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costbp.config import load_plan
from costbp.estimators import build_estimator
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import DIRECTIONS
from costbp.estimators.memory_plans import PLANS, blocks
from costbp.estimators.oracles import Central, Exact
from costbp.estimators.projected import Projected
from costbp.estimators.variance import Accumulate
from costbp.models.build import Head, build_model
from costbp.objective import Key, Objective
from costbp.train.loop import cross_entropy
from tests.conftest import ROOT, Lift64

KEY = Key(7, 3)


def encoder(dropout: float = 0.0) -> Objective:
    plan_model = load_plan(base=ROOT / "config/config.yaml").catalog.models["tiny_lora"]
    entry = plan_model.model_copy(update={"dropout": dropout})
    module = build_model(entry, 4, Path("unused"), seed=1, width=0).double()
    objective = Objective(module, cross_entropy)
    noise = torch.randn(
        objective.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    objective.theta.add_(0.05 * noise)  # LoRA's B starts at zero, where half the gradient vanishes
    return objective


def batch(n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(n, 8, dtype=torch.long)
    mask[0, 5:] = 0
    ids = torch.randint(3, 2000, (n, 8), generator=generator)
    labels = torch.randint(0, 4, (n,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def objective(monkeypatch):
    monkeypatch.chdir(ROOT)
    return encoder()


def reference(objective, data):
    with Lift64():
        loss, gradient = objective.gradient(data)
    return loss, gradient.clone()


def tangents_of(objective, count):
    return torch.stack([DIRECTIONS["gaussian"](objective.theta, KEY.at(i)) for i in range(count)])


@pytest.mark.parametrize(("count", "chunk"), [(1, None), (5, None), (5, 2), (5, 5)])
def test_exact_oracle_is_the_derivative(objective, count, chunk):
    loss, gradient = reference(objective, batch())
    tangents = tangents_of(objective, count)
    with Lift64():
        value, derivatives = Exact(chunk)(objective, batch(), tangents)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivatives, tangents @ gradient, rtol=1e-11, atol=1e-12)
    assert not derivatives.requires_grad


def test_projected_combines_derivatives_and_directions(objective):
    _, gradient = reference(objective, batch())
    estimator = Projected(Exact(), DIRECTIONS["gaussian"], 4)
    with Lift64():
        estimate = estimator.estimate(objective, [batch()], KEY)
        tangents = tangents_of(objective, 4)
    expected = ((tangents @ gradient)[:, None] * tangents).mean(0)
    torch.testing.assert_close(estimate.gradient, expected, rtol=1e-10, atol=1e-12)
    assert estimate.derivatives.shape == (4,)


def test_coordinate_directions_give_the_gradient():
    torch.manual_seed(0)
    objective = Objective(Head(6, 3).double(), cross_entropy)
    data = {"features": torch.randn(5, 6).double(), "labels": torch.tensor([0, 1, 2, 0, 1])}
    _, gradient = objective.gradient(data)
    _, derivatives = Exact()(objective, data, torch.eye(objective.d, dtype=torch.float64))
    torch.testing.assert_close(derivatives, gradient, rtol=1e-12, atol=1e-15)


def test_central_difference_error_falls_with_the_square_of_eps(objective):
    _, gradient = reference(objective, batch())
    tangents = tangents_of(objective, 2)
    errors = []
    for eps in (4e-2, 2e-2, 1e-2):
        with Lift64():
            _, derivatives = Central(eps)(objective, batch(), tangents)
        errors.append((derivatives - tangents @ gradient).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_mean_of_many_estimates_has_the_predicted_error():
    torch.manual_seed(0)
    objective = Objective(Head(6, 3).double(), cross_entropy)
    data = {"features": torch.randn(5, 6).double(), "labels": torch.tensor([0, 1, 2, 0, 1])}
    gradient = objective.gradient(data)[1].clone()
    count = 4000
    estimate = Projected(Exact(500), DIRECTIONS["gaussian"], count).estimate(objective, [data], KEY)
    error = (estimate.gradient - gradient).square().sum() / gradient.square().sum()
    predicted = (objective.d + 1) / count
    assert 0.3 * predicted < error < 3 * predicted


def test_memory_plans_change_no_bit(objective):
    assert len(blocks(objective.module)) == 2
    plain = Backprop(PLANS["none"]).estimate(objective, [batch()], KEY).gradient.clone()
    for name, plan in PLANS.items():
        again = Backprop(plan).estimate(objective, [batch()], KEY).gradient
        assert torch.equal(plain, again), name
    assert not any("forward" in vars(block) for block in blocks(objective.module))


def test_accumulation_equals_one_larger_batch(objective):
    parts = [batch(3, seed) for seed in range(4)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss, gradient = reference(objective, whole)
    with Lift64():
        estimate = Accumulate(Backprop(PLANS["none"]), 4).estimate(objective, parts, KEY)
    torch.testing.assert_close(estimate.gradient, gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(estimate.loss, loss, rtol=1e-12, atol=0)


def test_every_method_leaves_theta_bit_equal_and_repeats_itself(objective):
    plan = load_plan()
    objective.module.float()
    single = Objective(objective.module, cross_entropy)
    for name, method in plan.catalog.methods.items():
        estimator = build_estimator(method)
        data = [batch(3, seed) for seed in range(estimator.batches_per_step)]
        before = single.theta.clone()
        first = estimator.estimate(single, data, KEY).gradient.clone()
        assert torch.equal(before, single.theta), name
        assert torch.equal(first, estimator.estimate(single, data, KEY).gradient), name
        assert first.isfinite().all() and first.any(), name


def test_dropout_masks_are_shared_by_both_sides_of_a_difference(monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = encoder(dropout=0.3)
    with objective.noise(KEY), torch.no_grad(), Lift64():
        values = {float(objective.value(batch())) for _ in range(3)}
    with objective.noise(KEY.at(0)), torch.no_grad(), Lift64():
        other = float(objective.value(batch()))
    assert len(values) == 1
    assert other not in values


def test_non_finite_derivatives_are_dropped_and_counted():
    def oracle(objective, data, tangents):
        derivatives = torch.ones(len(tangents))
        derivatives[1] = float("nan")
        return torch.tensor(1.0), derivatives

    objective = Objective(Head(6, 3), cross_entropy)
    estimate = Projected(oracle, DIRECTIONS["gaussian"], 3).estimate(objective, [{}], KEY)
    assert estimate.non_finite == 1
    assert estimate.gradient.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(0, 2**31)] * 3), st.tuples(*[st.integers(0, 2**31)] * 3))
def test_keys_name_draws(one, other):
    first, second = Key(*one), Key(*other)
    assert (first.number == second.number) == (one == other)
    assert 0 <= first.number < 2**63


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        Objective(Head(2, 2).requires_grad_(False), cross_entropy)
