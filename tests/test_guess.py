"""Forward gradients along guessed directions, against local losses written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.families import FAMILIES
from costbp.estimators.guess import LocalGuess
from costbp.estimators.memory_plans import blocks
from costbp.estimators.oracles import Exact
from costbp.models.modules import Head
from costbp.objective import Key, Objective
from tests.conftest import Lift64
from tests.small import class_loss, examples, network, reference, small_model

KEY = Key(7, 3)


class Residual(nn.Module):
    """A block that returns hidden states alone, or in a tuple as some models' blocks do."""

    def __init__(self, *, as_tuple):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.as_tuple = as_tuple

    def forward(self, x, shift=0.0, *, scale):
        result = x + torch.tanh(scale * self.linear(x)) + shift
        return (result, "extra") if self.as_tuple else result


class Blocks(nn.Module):
    """A trained stem would be lost on local losses, so it is frozen; three blocks and a head."""

    def __init__(self, *, as_tuple):
        super().__init__()
        self.stem = nn.Linear(4, 4).requires_grad_(False)
        self.blocks = nn.ModuleList(Residual(as_tuple=as_tuple) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, batch):
        x = self.stem(batch["features"])
        for index, block in enumerate(self.blocks):
            x = block(x, 0.1 * index, scale=1.5)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


def by_hand(module, data):
    """Each block's and the head's unit guess, as rows [4, d], parameters in module order."""
    trained = [p for p in module.parameters() if p.requires_grad]
    x, rows = module.stem(data["features"]), []
    for index, block in enumerate(module.blocks):
        x = x.detach() + torch.tanh(1.5 * block.linear(x.detach())) + 0.1 * index
        loss = class_loss(module.head(x), data)
        owners = [list(block.parameters())]
        if index == len(module.blocks) - 1:
            owners.append(list(module.head.parameters()))
        for owned in owners:
            gradients = torch.autograd.grad(loss, owned, retain_graph=True)
            found = dict(zip(map(id, owned), gradients, strict=True))
            row = torch.cat([found.get(id(p), torch.zeros_like(p)).reshape(-1) for p in trained])
            rows.append(row / row.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_estimate_is_the_projection_on_the_blocks_local_gradients(as_tuple):
    torch.manual_seed(0)
    objective = Objective(Blocks(as_tuple=as_tuple).double(), class_loss)
    data = examples()
    _, gradient = reference(objective, data)
    guesses = by_hand(objective.module, data)
    wanted = guesses.T @ (guesses @ gradient)
    estimate = LocalGuess(Exact()).estimate(objective, [data], KEY)
    torch.testing.assert_close(estimate.gradient, wanted, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(estimate.derivatives, guesses @ gradient, rtol=1e-10, atol=1e-14)
    assert float(wanted.norm()) < 0.999 * float(gradient.norm())  # something is lost
    again = guesses.T @ (guesses @ estimate.gradient)
    torch.testing.assert_close(again, estimate.gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("module", [Head(4, 3), network().module])
def test_a_model_of_one_block_gets_its_gradient(module):
    objective = Objective(module.double(), class_loss)
    _, gradient = reference(objective, examples())
    estimate = LocalGuess(Exact()).estimate(objective, [examples()], KEY)
    torch.testing.assert_close(estimate.gradient, gradient, rtol=1e-12, atol=1e-15)
    assert float(estimate.derivatives) == pytest.approx(float(gradient.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_on_an_architecture_it_is_a_projection_exact_for_last_block_and_head(family):
    objective, data = small_model(family)
    before = objective.theta.clone()
    _, gradient = reference(objective, data)
    with Lift64():
        estimate = LocalGuess(Exact()).estimate(objective, [data], KEY).gradient.clone()
    assert torch.equal(objective.theta, before)
    along = float(estimate @ gradient)
    assert 0 < along == pytest.approx(float(estimate @ estimate), rel=1e-10)
    first = {id(p) for block in blocks(objective.module)[:-1] for p in block.parameters()}
    parameters = dict(objective.module.named_parameters())
    exact = torch.zeros(objective.d, dtype=torch.bool)
    for name, (start, stop, _) in objective.slices.items():
        exact[start:stop] = id(parameters[name]) not in first
    assert 0 < int(exact.sum()) < objective.d
    torch.testing.assert_close(estimate[exact], gradient[exact], rtol=1e-9, atol=1e-14)
    assert float(estimate[~exact].norm()) < (1 - 1e-6) * float(gradient[~exact].norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_alone_gets_its_gradient(family):
    objective, data = small_model(family, train="head")
    _, gradient = reference(objective, data)
    with Lift64():
        estimate = LocalGuess(Exact()).estimate(objective, [data], KEY).gradient
    torch.testing.assert_close(estimate, gradient, rtol=1e-10, atol=1e-14)
