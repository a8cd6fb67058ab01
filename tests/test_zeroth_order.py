"""Finite differences where every derivative is known: error against eps, and the best eps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from costbp.estimators.directions import Directions
from costbp.estimators.oracles import Central, OneSided
from costbp.objective import Objective
from costbp.theory.variance import best_eps


class Angles(nn.Module):
    """Parameters whose loss is the product of a smooth function along one line."""

    def __init__(self, slopes):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(slopes)))
        self.register_buffer("slopes", torch.tensor(slopes))

    def forward(self, batch):
        return self.slopes @ self.theta


def exponential(dtype, at, slopes=(0.3, -0.7, 0.5)):
    """exp(s . theta) with s . theta = ``at``: along z every derivative is (s . z)^n exp(at)."""
    objective = Objective(Angles(list(slopes)).to(dtype), lambda x, batch: x.exp())
    slopes = objective.module.slopes
    objective.theta.copy_(at * slopes / (slopes @ slopes))
    return objective


def along(objective, z):
    return Directions(objective, 1, lambda k, name: torch.tensor(z, dtype=torch.float64))


def error(oracle, objective, z=(1.0, 2.0, -1.0)):
    """Of the derivative along z, against the closed form at theta as it is rounded."""
    slope = float(objective.module.slopes.double() @ torch.tensor(z, dtype=torch.float64))
    _, derivatives = oracle(objective, {}, along(objective, z))
    inner = float(objective.module.slopes.double() @ objective.theta.double())
    return float(derivatives) - slope * math.exp(inner), slope, math.exp(inner)


@pytest.mark.parametrize("how", ["never", "always"])
def test_central_error_is_the_third_derivative_term(how):
    objective = exponential(torch.float64, 0.4)
    for eps in (1e-1, 1e-2, 1e-3):
        found, slope, value = error(Central(eps, how), objective)
        assert found == pytest.approx(eps**2 / 6 * slope**3 * value, rel=max(0.05 * eps, 3e-3))


@pytest.mark.parametrize("how", ["never", "always"])
def test_one_sided_error_is_the_second_derivative_term(how):
    objective = exponential(torch.float64, 0.4)
    for eps in (1e-2, 1e-3, 1e-4):
        found, slope, value = error(OneSided(eps, how), objective)
        assert found == pytest.approx(eps / 2 * slope**2 * value, rel=2 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_eps_is_the_predicted_one_within_a_factor_of_four(dtype):
    grid = [2.0**-k for k in range(1, 40)]
    errors = []
    for eps in grid:  # root mean square over starts, since rounding depends on them
        found = [
            error(Central(eps, "never"), exponential(dtype, 0.31 + 0.013 * i))[0] for i in range(12)
        ]
        errors.append(math.sqrt(sum(e**2 for e in found) / len(found)))
    best = grid[errors.index(min(errors))]
    _, slope, value = error(Central(1e-2, "never"), exponential(dtype, 0.31 + 0.013 * 6))
    predicted = best_eps(value, slope**3 * value, torch.finfo(dtype).eps / 2)
    assert predicted / 4 < best < 4 * predicted
    # falling with eps^2 above, rising with 1 / eps below
    coarse = [e for e, eps in zip(errors, grid, strict=True) if 30 * predicted < eps < 0.3]
    ratios = [a / b for a, b in itertools.pairwise(coarse)]
    assert len(ratios) >= 1 and all(3.5 < ratio < 4.5 for ratio in ratios)
    fine = [e for e, eps in zip(errors, grid, strict=True) if eps < predicted / 16][:4]
    assert fine[-1] > 2 * fine[0] > 4 * min(errors)
