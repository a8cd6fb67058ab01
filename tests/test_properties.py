"""Whatever shapes, dtype, K and chunk: exact derivatives are directions times gradient."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from costbp.estimators.calibrated import Calibrated
from costbp.estimators.directions import (
    Coordinate,
    Gaussian,
    LowRank,
    Orthogonal,
    Rademacher,
    Sparse,
    Sphere,
    pieces,
)
from costbp.estimators.oracles import Central, Exact, OneSided
from costbp.estimators.projected import Projected
from costbp.objective import Key, Objective
from tests.small import class_loss, reference

SOURCES = st.sampled_from(
    [
        Gaussian,
        Rademacher,
        Sphere,
        Orthogonal,
        Coordinate,
        lambda: Sparse(0.5, 1),
        lambda: LowRank(1),
        lambda: Calibrated(2, 1, None, "scale"),
    ]
)


class Stack(nn.Module):
    """Linear layers with and without bias, some of them frozen, a norm between them."""

    def __init__(self, widths, biases, frozen):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=bias) for (a, b), bias in zip(pairs, biases, strict=False)
        )
        for layer, freeze in zip(self.layers[:-1], frozen, strict=False):
            layer.requires_grad_(not freeze)
        self.norms = nn.ModuleList(nn.LayerNorm(b) for _, b in pairs[:-1])

    def forward(self, batch):
        x = batch["features"]
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = norm(torch.tanh(layer(x)))
        return self.layers[-1](x)


@st.composite
def problems(draw):
    widths = draw(st.lists(st.integers(2, 5), min_size=2, max_size=4))
    flags = st.lists(st.booleans(), min_size=3, max_size=3)
    torch.manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    objective = Objective(Stack(widths, draw(flags), draw(flags)).to(dtype), class_loss)
    n = draw(st.integers(1, 4))
    shape = draw(st.sampled_from([(n,), (n, 2)]))  # with or without a sequence
    features = torch.randn(*shape, widths[0]).to(dtype)
    if len(shape) == 2:
        objective.loss = lambda logits, batch: class_loss(logits.flatten(0, 1), batch)
    labels = torch.randint(0, widths[-1], (features[..., 0].numel(),))
    return objective, {"features": features, "labels": labels}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(), SOURCES, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4)))
def test_exact_derivatives_are_directions_times_gradient(problem, source, count, chunk):
    objective, data = problem
    count = min(count, objective.d)
    loss, gradient = reference(objective, data)
    key, source, oracle = Key(7, 3), source(), Exact(chunk)
    before = objective.theta.clone()
    source.update(objective, key, lambda directions: oracle(objective, data, directions)[1])
    directions = source.draw(objective, key, count)
    estimate = Projected(oracle, source, count).estimate(objective, [data], key)
    precision = 200 * torch.finfo(objective.theta.dtype).eps
    wanted = directions.dense @ gradient
    scale = 1 + float(gradient.norm() * directions.dense.norm())
    assert estimate.derivatives.shape == (count,)
    assert float((estimate.derivatives - wanted).abs().max()) < precision * scale
    assert abs(float(estimate.loss - loss)) < precision * (1 + float(loss))
    dual = directions.dual or directions.part
    mean = torch.cat(
        [sum(wanted[k] * dual(k, p) for k in range(count)) / count for p in pieces(objective)]
    )
    assert float((estimate.gradient - mean).abs().max()) < precision * scale**2
    assert torch.equal(objective.theta, before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems(), SOURCES, st.integers(1, 4), st.sampled_from(["auto", "always", "never"]))
def test_differences_are_those_of_losses_at_moved_parameters(problem, source, count, how):
    objective, data = problem
    objective = Objective(objective.module.double(), objective.loss)
    data = data | {"features": data["features"].double()}
    count, eps, before = min(count, objective.d), 1e-3, objective.theta.clone()
    source = source()
    source.update(objective, Key(7, 3), lambda directions: torch.ones(directions.count))
    directions = source.draw(objective, Key(7, 3), count)

    def losses(step):
        found = []
        for z in directions.dense:
            with objective.returning():
                objective.theta.copy_(before + step * z)
                found.append(objective.value(data).detach())
        return torch.stack(found)

    up, down, base = losses(eps), losses(-eps), losses(0)[0]
    for oracle, value, derivatives in (
        (Central(eps, how), (up + down).mean() / 2, (up - down) / (2 * eps)),
        (OneSided(eps, how), base, (up - base) / eps),
    ):
        found = oracle(objective, data, directions)
        torch.testing.assert_close(found[0], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], derivatives, rtol=1e-7, atol=1e-7)
        assert torch.equal(objective.theta, before)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(*[st.tuples(*[st.integers(0, 2**31)] * 2, st.lists(st.integers(-3, 9), max_size=3))] * 2)
def test_keys_name_draws(one, other):
    first, second = (Key(seed, step, tuple(path)) for seed, step, path in (one, other))
    assert (first.number == second.number) == (one == other)
    assert 0 <= first.number < 2**63
    assert first.at(1).at(2) == Key(first.seed, first.step, (*first.path, 1, 2))
