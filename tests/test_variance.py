"""Wrappers and what is done to estimates: SVRG, accumulation, clipping, signs, scales."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from costbp.config.methods import MethodEntry
from costbp.estimators.backprop import Backprop
from costbp.estimators.clipping import Clipped
from costbp.estimators.directions import Gaussian, Sparse
from costbp.estimators.memory_plans import PLANS
from costbp.estimators.oracles import Central, Exact, OneSided
from costbp.estimators.projected import Projected
from costbp.estimators.variance import SVRG, Accumulate
from costbp.objective import Key
from tests.small import examples, linear_objective, network, reference

BP = Backprop(PLANS["none"])
FMAD = Projected(Exact(), Gaussian(), 2)
ZO = Projected(Central(1e-3, "never"), Gaussian(), 2)
INNER = {"bp": BP, "fmad": FMAD, "zo": ZO, "sparse": Projected(Exact(), Sparse(0.5, 2))}


def batches(n, start=0, dtype=torch.float64):
    return [examples(5, start + i, dtype) for i in range(n)]


def gradient_at(objective, theta, data):
    """By autograd, mean over batches, at another theta."""
    other = network()
    other.theta.copy_(theta)
    return torch.stack([reference(other, batch)[1] for batch in data]).mean(0)


def move(objective, seed=1):
    noise = torch.randn(objective.d, generator=torch.Generator().manual_seed(seed))
    objective.theta.add_(0.1 * noise.to(objective.theta.dtype))


# --- SVRG --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INNER)
def test_svrg_gives_mu_where_theta_has_not_moved(name, dtype):
    objective = network(dtype)
    svrg = SVRG(copy.deepcopy(INNER[name]), 5, 3)
    mu = svrg.estimate(objective, batches(3, dtype=dtype), Key(7, 0)).gradient.clone()
    assert mu.any()
    for step in (1, 4):
        estimate = svrg.estimate(objective, batches(1, step, dtype), Key(7, step))
        assert torch.equal(estimate.gradient, mu)


def test_svrg_around_backprop_is_its_formula():
    objective, svrg = network(), SVRG(BP, 3, 2)
    snapshot, behind = None, None
    for step in range(7):
        data = batches(len(svrg.passes(step)), 10 * step)
        theta = objective.theta.clone()
        estimate = svrg.estimate(objective, data, Key(7, step))
        if step % 3 == 0:
            snapshot, behind = theta, data
            wanted = gradient_at(objective, theta, data)
        else:
            wanted = gradient_at(objective, theta, data) - gradient_at(objective, snapshot, data)
            wanted += gradient_at(objective, snapshot, behind)
        torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-11, atol=1e-14)
        loss = torch.stack([reference(objective, batch)[0] for batch in data]).mean()
        torch.testing.assert_close(estimate.loss, loss, rtol=1e-13, atol=0)
        assert torch.equal(objective.theta, theta)
        move(objective, step)


def test_svrg_uses_the_same_directions_at_both_points():
    objective, svrg = network(), SVRG(FMAD, 5, 1)
    theta = objective.theta.clone()
    mu = svrg.estimate(objective, batches(1), Key(7, 0)).gradient.clone()
    move(objective)
    data, key = batches(1, 3), Key(7, 1)
    z = Gaussian().draw(objective, key, 2).dense
    difference = gradient_at(objective, objective.theta, data) - gradient_at(objective, theta, data)
    wanted = z.T @ (z @ difference) / 2 + mu
    found = svrg.estimate(objective, data, key).gradient
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", INNER)
def test_svrg_continues_from_its_state(name):
    objective, first = network(), SVRG(copy.deepcopy(INNER[name]), 4, 2)
    first.estimate(objective, batches(2), Key(7, 0))
    second = SVRG(copy.deepcopy(INNER[name]), 4, 2)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    move(objective)
    for step in (1, 2):
        data = batches(1, step)
        wanted = first.estimate(objective, data, Key(7, step)).gradient.clone()
        assert torch.equal(second.estimate(objective, data, Key(7, step)).gradient, wanted)


def test_passes_count_what_svrg_around_accumulation_looks_at():
    svrg = SVRG(Accumulate(BP, 2), 4, 3)
    assert svrg.passes(0) == svrg.passes(4) == (1,) * 6
    assert svrg.passes(1) == svrg.passes(3) == (2, 2)
    assert svrg.cycle == 4
    objective, data = network(), batches(6)
    estimate = svrg.estimate(objective, data, Key(7, 0))
    wanted = gradient_at(objective, objective.theta, data)
    torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-12, atol=1e-15)


# --- accumulation ------------------------------------------------------------------------------


def test_accumulation_equals_one_larger_batch():
    objective, parts = network(), batches(4)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss, gradient = reference(objective, whole)
    estimate = Accumulate(BP, 4).estimate(objective, parts, Key(7, 3))
    torch.testing.assert_close(estimate.gradient, gradient, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(estimate.loss, loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("inner", [FMAD, ZO])
def test_micro_batches_have_directions_of_their_own(inner):
    objective, parts, key = network(), batches(3), Key(7, 3)
    rows = []
    for index, part in enumerate(parts):
        z = Gaussian().draw(objective, key.at(index), 2).dense
        rows.append(z.T @ (z @ reference(objective, part)[1]) / 2)
    estimate = Accumulate(inner, 3).estimate(objective, parts, key)
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if inner is FMAD else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(estimate.gradient, torch.stack(rows).mean(0), **tolerance)
    assert estimate.derivatives.shape == (6,)


# --- clipping and signs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"norm": 10.0}, [3.0, -4.0, 0.0]),
        ({"norm": 1.0}, [0.6, -0.8, 0.0]),
        ({"sign": True}, [1.0, -1.0, 0.0]),
        ({"norm": 1.0, "sign": True}, [1.0, -1.0, 0.0]),
    ],
)
def test_clipping_and_signs(options, expected):
    objective = linear_objective((3,))
    data = {"g": torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)}
    estimate = Clipped(BP, **options).estimate(objective, [data], Key(7, 3))
    torch.testing.assert_close(estimate.gradient, torch.tensor(expected, dtype=torch.float64))
    assert float(estimate.loss) == pytest.approx(float(objective.theta @ data["g"]))


def test_clipping_is_outermost():
    objective = network()
    method = entry({"kind": "backprop"}, svrg={"period": 2, "snapshot_batches": 1}, sign=True)
    estimator = method.build()
    assert isinstance(estimator, Clipped) and isinstance(estimator.inner, SVRG)
    estimator.estimate(objective, batches(1), Key(7, 0))
    move(objective)
    estimate = estimator.estimate(objective, batches(1, 2), Key(7, 1))
    assert set(estimate.gradient.tolist()) <= {-1.0, 0.0, 1.0}
    # what SVRG remembers is not the signs
    assert not set(estimator.state_dict()["mu"].tolist()) <= {-1.0, 0.0, 1.0}


# --- derivatives and scales --------------------------------------------------------------------


def fixed(*derivatives):
    """An oracle that measures these."""

    def oracle(objective, batch, directions):
        return torch.tensor(1.0), torch.tensor(derivatives, dtype=torch.float64)

    return oracle


def combined(weights):
    """sum_k weights_k z_k of the plain Gaussian directions."""
    z = Gaussian().draw(network(), Key(7, 3), len(weights)).dense
    return torch.tensor(weights, dtype=torch.float64) @ z


def test_non_finite_derivatives_are_dropped_and_counted():
    oracle = fixed(2.0, math.nan, math.inf, -math.inf, -1.0)
    estimate = Projected(oracle, Gaussian(), 5).estimate(network(), [{}], Key(7, 3))
    wanted = combined([2.0 / 5, 0, 0, 0, -1.0 / 5])
    assert estimate.figures[3] == 3
    torch.testing.assert_close(estimate.gradient, wanted)


def test_only_non_finite_derivatives_give_nothing():
    for scale in ("unbiased", "spread"):
        projected = Projected(fixed(math.nan, math.inf), Gaussian(), 2, scale)
        estimate = projected.estimate(network(), [{}], Key(7, 3))
        assert estimate.figures[3] == 2 and not estimate.gradient.any()


def test_the_limit_clips_derivatives():
    projected = Projected(fixed(5.0, -0.5, -9.0), Gaussian(), 3, limit=2.0)
    estimate = projected.estimate(network(), [{}], Key(7, 3))
    torch.testing.assert_close(estimate.gradient, combined([2 / 3, -0.5 / 3, -2 / 3]))


def test_spread_divides_by_the_standard_deviation_of_the_derivatives():
    derivatives = [1.0, 2.0, 6.0]  # mean 3, squares of deviations 4 + 1 + 9
    projected = Projected(fixed(*derivatives), Gaussian(), 3, "spread")
    estimate = projected.estimate(network(), [{}], Key(7, 3))
    spread = math.sqrt((4 + 1 + 9) / 2)
    torch.testing.assert_close(estimate.gradient, combined([c / 3 / spread for c in derivatives]))
    dropped = Projected(fixed(1.0, math.nan, 4.0), Gaussian(), 3, "spread")
    estimate = dropped.estimate(network(), [{}], Key(7, 3))
    spread = math.sqrt(2 * 1.5**2)
    torch.testing.assert_close(estimate.gradient, combined([1 / 3 / spread, 0, 4 / 3 / spread]))


def test_spread_is_that_of_the_losses_over_eps():
    objective, data, key, eps = network(), examples(), Key(7, 3), 1e-2
    estimate = Projected(OneSided(eps), Gaussian(), 4, "spread").estimate(objective, [data], key)
    z = Gaussian().draw(objective, key, 4).dense
    losses = torch.stack([objective.at(objective.theta + eps * row, data) for row in z]).detach()
    base = objective.at(objective.theta, data).detach()
    wanted = ((losses - base)[:, None] * z).mean(0) / losses.std()
    torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-9, atol=1e-12)


def entry(estimator, **options):
    sgd = {"name": "sgd", "lr": 1.0}
    return MethodEntry.model_validate(
        {"label": "x", "family": "zo", "estimator": estimator, "optimizer": sgd} | options
    )


def test_legacy_scale_multiplies_by_eps():
    spec = {"kind": "projected", "oracle": {"kind": "central", "eps": 0.01}, "clip": 1e9}
    found = {}
    for scale in ("unbiased", "legacy"):
        estimator = entry(spec | {"scale": scale}).build()
        found[scale] = estimator.estimate(network(), [examples()], Key(7, 3)).gradient.clone()
    torch.testing.assert_close(found["legacy"], 0.01 * found["unbiased"], rtol=1e-12, atol=0)
