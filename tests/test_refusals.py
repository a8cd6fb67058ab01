"""What forward mode can't differentiate is refused by name, in one line; never a silent zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from costbp.errors import UserError
from costbp.estimators.directions import Gaussian
from costbp.estimators.oracles import Central, Exact
from costbp.objective import Key, Objective
from tests.small import class_loss, examples

KEY = Key(7, 3)


class Doubled(torch.autograd.Function):
    """Has a backward rule and no forward one."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class BatchedDoubled(Doubled):
    """The same where vmap isn't what fails."""

    generate_vmap_rule = True


class OldStyle(torch.autograd.Function):
    """Written before torch.func: context and result in one method."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Layer(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.operator = operator

    def forward(self, x):
        return self.operator(self.linear(x))


class Stack(nn.Module):
    """A trained layer that runs ``operator``, under a plain one and a head."""

    def __init__(self, operator):
        super().__init__()
        self.layers = nn.ModuleList([Layer(torch.tanh), Layer(operator)])
        self.head = nn.Linear(4, 3).double()

    def forward(self, batch):
        x = batch["features"]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


OPERATORS = {
    "Doubled": Doubled.apply,
    "BatchedDoubled": BatchedDoubled.apply,
    "OldStyle": OldStyle.apply,
    "_cdist_forward": lambda x: torch.cdist(x, torch.zeros(4, 4, dtype=x.dtype)),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_without_forward_rule_is_named_with_its_module(name, count):
    objective = Objective(Stack(OPERATORS[name]), class_loss)
    directions = Gaussian().draw(objective, KEY, count)
    with pytest.raises(UserError) as caught:
        Exact()(objective, examples(), directions)
    message = str(caught.value)
    assert "module 'layers.1' (Layer)" in message
    assert name in message
    assert "use BP or ZO" in message
    assert "\n" not in message
    _, derivatives = Central(1e-6, "never")(objective, examples(), directions)  # as it advises
    assert derivatives.isfinite().all() and derivatives.all()


class Dequantised(torch.autograd.Function):
    """x W^T with 8-bit weights; knows nothing of tangents."""

    @staticmethod
    def forward(x, weight):
        return F.linear(x, weight.to(x.dtype) / 128 - 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad @ (ctx.weight.to(grad.dtype) / 128 - 1), None


class Packed(nn.Module):
    def __init__(self, key, *, buffer):
        super().__init__()
        packed = torch.randint(0, 256, (4, 4), dtype=torch.uint8)
        if buffer:
            self.register_buffer(key, packed)
        else:
            self.register_parameter(key, nn.Parameter(packed, requires_grad=False))
        self.key = key

    def forward(self, x):
        return Dequantised.apply(x, getattr(self, self.key))


@pytest.mark.parametrize(
    ("key", "buffer"),
    [("weight", False), ("anything", False), ("weight", True), ("qweight", True)],
)
def test_a_quantised_layer_is_refused(key, buffer):
    objective = Objective(Stack(Packed(key, buffer=buffer)), class_loss)
    with pytest.raises(UserError) as caught:
        Exact()(objective, examples(), Gaussian().draw(objective, KEY, 1))
    message = str(caught.value)
    assert "module 'layers.1.operator' (Packed) holds quantised weights" in message
    assert f"'{key}', torch.uint8" in message
    assert "\n" not in message


def test_other_errors_pass_through():
    def fails(x):
        raise RuntimeError("out of luck")

    objective = Objective(Stack(fails), class_loss)
    with pytest.raises(RuntimeError, match="out of luck"):
        Exact()(objective, examples(), Gaussian().draw(objective, KEY, 1))


def test_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train: no parameter") as caught:
        Objective(Stack(torch.tanh).requires_grad_(False), class_loss)
    assert "\n" not in str(caught.value)


def test_mixed_dtypes_can_not_be_one_vector():
    module = Stack(torch.tanh)
    module.head.float()
    with pytest.raises(UserError, match="must share one dtype and one device"):
        Objective(module, class_loss)
