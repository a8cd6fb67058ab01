"""Directions of its own for each example, or for each of some groups, of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import costbp
from costbp.config.methods import ProjectedSpec
from costbp.config.shares import RULE_OF_THUMB
from costbp.cost.step import CostCounter
from costbp.errors import UserError
from costbp.estimators.directions import Gaussian, Orthogonal, Rademacher
from costbp.estimators.oracles import Central, Exact
from costbp.estimators.projected import Projected, split
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from costbp.theory import variance
from tests.small import class_loss, examples, network, reference

KEY = Key(5, 2)


class Point(nn.Module):
    """theta as two tensors, handed to a loss that is linear in it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(d - 2, dtype=torch.float64))
        self.second = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))

    def forward(self, batch):
        return torch.cat([self.first, self.second.reshape(-1)])


def linear(d: int) -> Objective:
    """Loss mean_i g_i . theta: the batch holds each example's gradient [n, d]."""
    return Objective(Point(d), lambda theta, batch: (batch["g"] @ theta).mean())


def drawn(n: int, d: int, square: float, spread: float, seed: int = 0) -> torch.Tensor:
    """n gradients [n, d] of mean g, |g|^2 = square, and covariance (spread / d) I."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * math.sqrt(spread / d)
    return math.sqrt(square / d) + noise


def mean_error(squares: torch.Tensor) -> tuple[float, float]:
    """The mean, and five of its standard errors."""
    return float(squares.mean()), 5 * float(squares.std()) / math.sqrt(len(squares))


@pytest.mark.parametrize("groups", [8, 4, 2])
@pytest.mark.parametrize(("square", "spread"), [(1.0, 0.0), (1.0, 8.0), (0.0, 3.0)])
def test_error_that_directions_add_is_the_predicted_share(groups, square, spread):
    """By drawing gradients and directions, without any estimator."""
    n, batch, d = 40_000, 8, 5
    g = drawn(n * batch, d, square, spread).view(n, groups, batch // groups, d).mean(2)
    z = torch.randn(n, groups, d, generator=torch.Generator().manual_seed(1)).double()
    estimates = ((g * z).sum(-1, keepdim=True) * z).mean(1)
    found, error = mean_error((estimates - g.mean(1)).square().sum(1))
    shared = variance.relative_error(variance.gaussian(d), 1) * (square + spread / batch)
    wanted = shared * variance.group_ratio(square, spread, batch, groups)
    assert error < 0.1 * wanted
    assert abs(found - wanted) < error


@pytest.mark.parametrize(
    ("source", "moment"), [(Gaussian(), variance.gaussian), (Rademacher(), variance.fixed_length)]
)
def test_error_of_the_estimator_is_the_predicted_one(source, moment):
    square, spread, batch, d = 1.0, 4.0, 4, 4
    objective, found = linear(d), []
    estimator = Projected(Exact(), source, groups="examples")
    for seed in range(800):
        g = drawn(batch, d, square, spread, seed)
        estimate = estimator.estimate(objective, [{"g": g}], Key(seed, 1))
        found.append((estimate.gradient - g.mean(0)).square().sum())
    mean, error = mean_error(torch.stack(found))
    shared = variance.relative_error(moment(d), 1) * (square + spread / batch)
    wanted = shared * variance.group_ratio(square, spread, batch, batch)
    assert error < 0.3 * wanted
    assert abs(mean - wanted) < error


def test_the_ratio_between_its_ends():
    assert variance.group_ratio(2.0, 0.0, 8, 8) == 1 / 8
    assert variance.group_ratio(0.0, 2.0, 8, 8) == 1
    assert variance.group_ratio(1.0, 8.0, 8, 1) == 1
    assert variance.group_ratio(1.0, 8.0, 8, 8) == pytest.approx(9 / 16)  # by hand


@pytest.mark.parametrize("oracle", [Exact(), Central(1e-6, "never"), Central(1e-6, "always")])
@pytest.mark.parametrize(("groups", "count"), [("examples", 1), ("examples", 3), (2, 2), (3, 1)])
def test_the_estimate_is_the_mean_of_each_part_along_its_own_directions(oracle, groups, count):
    objective, data = network(), examples(5)
    estimator = Projected(oracle, Gaussian(), count, groups=groups)
    estimate = estimator.estimate(objective, [data], KEY)
    sizes = {"examples": [1] * 5, 2: [2, 3], 3: [1, 2, 2]}[groups]
    z = Gaussian().draw(objective, KEY, count * len(sizes)).dense.view(len(sizes), count, -1)
    wanted, start = torch.zeros(objective.d, dtype=torch.float64), 0
    for size, own in zip(sizes, z, strict=True):
        part = {name: rows[start : start + size] for name, rows in data.items()}
        slopes = own @ reference(objective, part)[1]
        wanted += size / 5 * (slopes[:, None] * own).mean(0)
        start += size
    torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(estimate.loss, reference(objective, data)[0], rtol=1e-9, atol=0)
    assert estimate.derivatives.shape == (count * len(sizes),)


def test_as_many_orthogonal_directions_as_parameters_in_equal_examples_are_exact():
    """Every example has the same gradient here, so its parts together see all of space."""
    objective = linear(6)
    g = drawn(6, 6, 1.0, 0.0)
    estimate = Projected(Exact(), Orthogonal(), groups="examples").estimate(
        objective, [{"g": g}], KEY
    )
    torch.testing.assert_close(estimate.gradient, g[0], rtol=1e-6, atol=0)


def test_spread_is_that_of_the_examples():
    objective, data = network(), examples(5)
    plain, scaled = (
        Projected(Central(1e-4), Gaussian(), scale=scale, groups="examples")
        for scale in ("unbiased", "spread")
    )
    plain = plain.estimate(objective, [data], KEY)
    wanted = plain.gradient / plain.derivatives.std()
    torch.testing.assert_close(scaled.estimate(objective, [data], KEY).gradient, wanted)


def test_every_part_has_dropout_masks_of_its_own():
    torch.manual_seed(0)
    module = nn.Sequential(Head(4, 3), nn.Dropout(0.5)).double()
    objective, data = Objective(module, class_loss), examples(2)
    estimate = Projected(Exact(), Gaussian(), groups="examples").estimate(objective, [data], KEY)
    losses = []
    for index in range(2):
        with objective.noise(KEY.at(index)):
            part = {name: rows[index : index + 1] for name, rows in data.items()}
            losses.append(objective.value(part).detach())
    torch.testing.assert_close(estimate.loss, torch.stack(losses).mean())
    with objective.noise(KEY):
        assert not torch.isclose(objective.value(data), estimate.loss)


@pytest.mark.parametrize(("kind", "units"), [("central", 2), ("exact", 2), ("one_sided", 2)])
@pytest.mark.parametrize("groups", ["examples", 3])
def test_units_are_those_of_one_shared_direction(kind, units, groups):
    objective = Objective(Head(32, 5), class_loss)
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    spec = ProjectedSpec(kind="projected", oracle={"kind": kind}, groups=groups)
    cost = CostCounter(spec.build())(objective, [data], KEY)
    assert cost.units == units == spec.closed_form(RULE_OF_THUMB)


def test_more_groups_than_examples_are_as_many_as_there_are():
    assert [share for share, _ in split(examples(3), 8)] == [1 / 3] * 3


def test_a_batch_that_has_no_rows_is_refused_in_one_line():
    data = {"input_ids": torch.zeros(2, 8), "pixel_values": torch.zeros(64, 3)}
    with pytest.raises(UserError, match="can't be told apart into examples"):
        split(data, "examples")


def test_spread_needs_several_derivatives():
    with pytest.raises(ValueError, match="'spread' needs"):
        ProjectedSpec(kind="projected", oracle={"kind": "central"}, scale="spread")
    given = {"kind": "projected", "oracle": {"kind": "central"}, "scale": "spread"}
    assert ProjectedSpec(**given, groups="examples").groups == "examples"


def test_in_a_loop_of_one_s_own_batches_are_cut_as_they_are():
    module = nn.Linear(4, 3)
    step = costbp.method("zo_per_example").on(
        module, lambda m, b: nn.functional.cross_entropy(m(b["x"][0]), b["y"])
    )
    step({"x": [torch.randn(5, 4)], "y": torch.zeros(5, dtype=torch.long), "words": list("abcde")})
    assert step.objective.finite()
