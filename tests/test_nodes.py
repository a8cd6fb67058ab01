"""Perturbed outputs of linear layers: unbiased for the gradient of the weights behind them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from costbp.cost.step import CostCounter
from costbp.errors import UserError
from costbp.estimators.nodes import NodePerturbation
from costbp.estimators.oracles import Central
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from tests.small import class_loss, examples, network, reference
from tests.test_estimators import batch, encoder

KEY = Key(4, 1)


def test_of_one_layer_it_equals_the_hand_computation():
    torch.manual_seed(0)
    objective, data = Objective(Head(4, 3).double(), class_loss), examples(5)
    estimate = NodePerturbation(Central(1e-4)).estimate(objective, [data], KEY)
    generator = KEY.at(0).generator()
    xi = torch.randn(15, generator=generator).double().view(5, 3)
    logits = objective.module(data).detach()
    slope = (logits.softmax(1) - nn.functional.one_hot(data["labels"], 3)).mul(xi).sum(1)
    back = slope[:, None] * xi / 5
    wanted = torch.cat([(back.T @ data["features"]).flatten(), back.sum(0)])
    torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(estimate.derivatives, slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(estimate.loss, class_loss(logits, data), rtol=1e-6, atol=0)


def unbiased(objective, data, draws):
    """Whether means over draws are the gradient's, along it and in random directions across it."""
    _, gradient = reference(objective, data)
    before, estimator = objective.theta.clone(), NodePerturbation(Central(1e-4))
    rows = [estimator.estimate(objective, [data], Key(s, 0)).gradient.clone() for s in range(draws)]
    assert torch.equal(objective.theta, before)
    probes = torch.randn(6, objective.d, generator=torch.Generator().manual_seed(2)).double()
    probes[0] = gradient
    found = torch.stack(rows) @ probes.T
    tolerance = 5 * found.std(0) / math.sqrt(draws)
    assert tolerance[0] < 0.5 * gradient @ gradient
    return bool(((found.mean(0) - probes @ gradient).abs() < tolerance).all())


def test_through_two_layers_it_is_unbiased():
    assert unbiased(network(), examples(5), 1500)


def test_a_step_s_error_is_of_second_order_behind_a_moved_layer_too():
    """Inputs of the second layer move with the first's outputs; their mean does by eps^2 alone."""
    objective, data = network(), examples(5)

    def at(eps: float) -> torch.Tensor:
        return NodePerturbation(Central(eps)).estimate(objective, [data], KEY).gradient.clone()

    exact = at(1e-5)
    coarse, fine = ((at(eps) - exact).norm() for eps in (2e-2, 1e-2))
    assert 3 < coarse / fine < 5


def test_a_row_s_places_add_up():
    """Several tokens an example, of which each has outputs of its own."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4).requires_grad_(False)
            self.first = nn.Linear(4, 3, bias=False)
            self.second = nn.Linear(3, 3)

        def forward(self, batch):
            return self.second(self.first(self.embed(batch["ids"])).tanh()).mean(1)

    torch.manual_seed(3)
    objective = Objective(Tokens().double(), class_loss)
    data = {"ids": torch.randint(0, 7, (3, 2)), "labels": torch.tensor([0, 2, 1])}
    assert unbiased(objective, data, 1500)


def test_what_is_no_linear_layer_is_refused():
    module = nn.Sequential(Head(4, 3), nn.LayerNorm(3)).double()
    objective = Objective(module, class_loss)
    with pytest.raises(UserError, match=r"'1\.weight' is in none"):
        NodePerturbation(Central(1e-4)).estimate(objective, [examples()], KEY)


def test_its_error_follows_the_outputs_not_the_weights():
    """One layer: sum over examples of (o + 1) |dL/dy|^2 |x|^2 / n^2, o outputs, however wide x is."""
    torch.manual_seed(0)
    n, width, classes = 6, 50, 3
    objective = Objective(Head(width, classes).double(), class_loss)
    objective.module.classifier.bias.requires_grad_(False)
    objective = Objective(objective.module, class_loss)
    x, labels = torch.randn(n, width).double(), torch.arange(n) % classes
    data = {"features": x, "labels": labels}
    _, gradient = reference(objective, data)
    estimator, found = NodePerturbation(Central(1e-4)), []
    for seed in range(600):
        estimate = estimator.estimate(objective, [data], Key(seed, 0))
        found.append((estimate.gradient - gradient).square().sum())
    found = torch.stack(found)
    back = objective.module(data).detach().softmax(1) - nn.functional.one_hot(labels, classes)
    squares = back.square().sum(1) * x.square().sum(1)
    wanted = float((classes + 1) * squares.sum() / n**2)
    assert (
        abs(float(found.mean()) - wanted) < 5 * float(found.std()) / math.sqrt(600) < 0.3 * wanted
    )


def test_adapters_of_an_encoder(monkeypatch):
    from tests.conftest import ROOT, Lift64

    monkeypatch.chdir(ROOT)
    objective, data = encoder(), batch()
    before = objective.theta.clone()
    with Lift64():
        estimate = NodePerturbation(Central(1e-4)).estimate(objective, [data], KEY)
    assert torch.equal(before, objective.theta)
    assert estimate.gradient.isfinite().all() and estimate.gradient.any()
    assert not any(module._forward_hooks for module in objective.module.modules())


def test_two_forwards_and_the_products_of_the_weights():
    objective = Objective(Head(32, 5), class_loss)
    data = {"features": torch.randn(8, 32), "labels": torch.zeros(8, dtype=torch.long)}
    assert CostCounter(NodePerturbation(Central(1e-3)))(objective, [data], KEY).units == 3
