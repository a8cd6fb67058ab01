"""HiZOO on a quadratic, where slope and curvature along a direction are known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from costbp.config import load_plan
from costbp.estimators.directions import Gaussian
from costbp.estimators.hessian_informed import HessianInformed
from costbp.estimators.oracles import Central
from costbp.estimators.projected import Projected
from costbp.objective import Key, Objective
from tests.conftest import ROOT

HESSIAN = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0, 10.0], dtype=torch.float64)


class Point(nn.Module):
    """theta in two tensors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1, 1, 4).double())
        self.second = nn.Parameter(torch.tensor([[0.5], [2.0]]).double())

    def forward(self, batch):
        return torch.cat([self.first, self.second.reshape(-1)])


def quadratic(dtype=torch.float64):
    """1/2 theta^T diag(h) theta + b . theta, whose differences have no error but rounding."""
    h = HESSIAN.to(dtype)
    return Objective(Point().to(dtype), lambda theta, batch: (h * theta**2 / 2 + theta).sum())


def test_estimate_and_update_equal_the_hand_computation():
    objective = quadratic()
    estimator = HessianInformed(Central(1e-2), smoothing=0.1)
    inverse = torch.ones_like(objective.theta)
    gradient = HESSIAN * objective.theta + 1
    for step in range(5):
        key = Key(7, step)
        u = Gaussian().draw(objective, key, 1).dense[0]
        z = u / inverse.sqrt()
        estimate = estimator.estimate(objective, [{}], key)
        slope, curvature = gradient @ z, (HESSIAN * z**2).sum() / 2
        torch.testing.assert_close(estimate.derivatives[0], slope, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(estimate.gradient, slope * z, rtol=1e-9, atol=1e-11)
        inverse = 0.9 * inverse + 0.1 * curvature * u**2 * inverse
        torch.testing.assert_close(estimator.inverse, inverse, rtol=1e-8, atol=0)
    loss = (HESSIAN * objective.theta**2 / 2 + objective.theta).sum()
    torch.testing.assert_close(estimate.loss, loss.detach())


def close(rows, wanted):
    """Whether the mean row is the wanted one within 5 standard errors, which say something."""
    tolerance = 5 * rows.std(0) / len(rows) ** 0.5
    assert (tolerance < 0.5 * wanted.abs().max()).all()
    return bool(((rows.mean(0) - wanted).abs() < tolerance).all())


def test_means_of_estimate_and_update():
    """E[(g . z) z] = Sigma g, and E[1/2 z^T H z u_i^2 s_i] = h_i + s_i/2 sum_j h_j/s_j for
    s = 1/Sigma: at s = h (d + 2) / 2 the update stands still."""
    objective = quadratic()
    estimator = HessianInformed(Central(1e-2), smoothing=1.0, limit=1e9)
    inverse = torch.tensor([0.5, 1, 2, 4, 0.25, 1], dtype=torch.float64)
    estimates, updates = [], []
    for seed in range(2500):
        estimator.load_state_dict({"inverse": inverse.clone()})
        estimates.append(estimator.estimate(objective, [{}], Key(seed, 1)).gradient.clone())
        updates.append(estimator.inverse.clone())
    assert close(torch.stack(estimates), (HESSIAN * objective.theta.detach() + 1) / inverse)
    assert close(torch.stack(updates), HESSIAN + inverse / 2 * (HESSIAN / inverse).sum())


def test_the_inverse_nears_a_multiple_of_the_hessian():
    objective = quadratic()
    estimator = HessianInformed(Central(1e-2), smoothing=1e-2)
    mean = torch.zeros_like(HESSIAN)
    for step in range(800):
        estimator.estimate(objective, [{}], Key(7, step))
        if step >= 400:
            mean += estimator.inverse / 400
    still = HESSIAN * (len(HESSIAN) + 2) / 2

    def spread(inverse):
        return float((inverse / still).log().std())

    assert spread(mean) < 0.5 * spread(torch.ones_like(mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theta_is_bit_equal_and_entries_stay_within_the_limit(dtype):
    objective = quadratic(dtype)
    estimator = HessianInformed(Central(1e-2), smoothing=1.0, limit=4.0)
    before = objective.theta.clone()
    for step in range(30):
        estimate = estimator.estimate(objective, [{}], Key(7, step))
        assert torch.equal(objective.theta, before)
        assert estimator.inverse.dtype == torch.float32 == estimate.derivatives.dtype
        assert 0.25 <= float(estimator.inverse.min()) <= float(estimator.inverse.max()) <= 4


def test_a_non_finite_slope_is_dropped_and_teaches_nothing():
    objective = quadratic()
    estimator = HessianInformed(Central(1e-2), smoothing=0.1)
    estimator.estimate(objective, [{}], Key(7, 0))
    learnt = estimator.inverse.clone()
    objective.loss = lambda theta, batch: theta.sum() * float("nan")
    estimate = estimator.estimate(objective, [{}], Key(7, 1))
    assert estimate.figures[3] == 1 and not estimate.gradient.any()
    assert torch.equal(estimator.inverse, learnt)


def test_at_the_authors_smoothing_it_is_plain_zeroth_order_for_a_thousand_steps():
    """At a thousand times the share of the newest curvature, what is learnt is mostly the curvature
    along the last directions, and shrinks every step."""
    plain, close, far = (quadratic() for _ in range(3))
    smoothing = load_plan(base=ROOT / "config/config.yaml").catalog.methods["hizoo"].estimator
    methods = {
        plain: Projected(Central(1e-2), Gaussian()),
        close: HessianInformed(Central(1e-2), smoothing.smoothing),
        far: HessianInformed(Central(1e-2), smoothing=1e-3),
    }
    start = plain.theta.clone()
    for step in range(1000):
        for objective, estimator in methods.items():
            gradient = estimator.estimate(objective, [{}], Key(7, step)).gradient
            objective.theta.add_(gradient, alpha=-2e-3)
    assert torch.allclose(methods[close].inverse, torch.ones(6).double(), atol=2e-4)
    moved = float((plain.theta - start).norm())
    assert float((close.theta - plain.theta).norm()) < 1e-3 * moved
    assert float((far.theta - plain.theta).norm()) > 0.1 * moved
    assert float(methods[far].inverse.max()) > 2
