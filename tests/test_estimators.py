"""Every method of the catalog, on the tiny encoder with LoRA that `tiny_lora` names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from costbp.config import load_plan
from costbp.config.methods import PythonSpec
from costbp.errors import UserError
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import Gaussian
from costbp.estimators.memory_plans import PLANS, blocks
from costbp.estimators.oracles import Central, Exact
from costbp.estimators.projected import Projected
from costbp.estimators.variance import Accumulate
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.objective import Key, Objective
from tests.conftest import ROOT, Lift64
from tests.small import ON_CPU, class_loss, examples, reference

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


@pytest.mark.parametrize(("count", "chunk"), [(1, None), (5, None), (5, 2), (5, 5)])
def test_exact_oracle_is_the_derivative(objective, count, chunk):
    loss, gradient = reference(objective, batch())
    directions = Gaussian().draw(objective, KEY, count)
    with Lift64():
        value, derivatives = Exact(chunk)(objective, batch(), directions)
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivatives, directions.dense @ gradient, rtol=1e-11, atol=1e-12)
    assert not derivatives.requires_grad


@pytest.mark.parametrize("oracle", [Exact(), Central(1e-6, "never")])
def test_projected_combines_derivatives_and_directions(objective, oracle):
    _, gradient = reference(objective, batch())
    with Lift64():
        estimate = Projected(oracle, Gaussian(), 4).estimate(objective, [batch()], KEY)
    z = Gaussian().draw(objective, KEY, 4).dense
    expected = ((z @ gradient)[:, None] * z).mean(0)
    torch.testing.assert_close(estimate.gradient, expected, rtol=1e-6, atol=1e-6)
    assert estimate.derivatives.shape == (4,)


def test_central_difference_error_falls_with_the_square_of_eps(objective):
    _, gradient = reference(objective, batch())
    directions = Gaussian().draw(objective, KEY, 2)
    errors = []
    for eps in (4e-2, 2e-2, 1e-2):
        with Lift64():
            _, derivatives = Central(eps)(objective, batch(), directions)
        errors.append((derivatives - directions.dense @ gradient).abs().max())
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_memory_plans_change_no_bit(objective):
    assert len(blocks(objective.module)) == 2
    plain = Backprop(PLANS["none"]).estimate(objective, [batch()], KEY).gradient.clone()
    for name, plan in ON_CPU.items():
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
    objective.module.float()
    single = Objective(objective.module, cross_entropy)
    before = single.theta.clone()
    for name, method in load_plan().catalog.methods.items():
        found = []
        for _ in range(2):
            estimator = method.build()
            for step in (0, 1):  # the first step fills what an estimator remembers
                data = [batch(3, seed) for seed in range(len(estimator.passes(step)))]
                estimate = estimator.estimate(single, data, Key(7, step))
                assert torch.equal(before, single.theta), name
            found.append(estimate.gradient.clone())
        assert torch.equal(*found), name
        assert found[0].isfinite().all() and found[0].any(), name
        assert float(estimate.loss) > 0 and estimate.loss.dtype == torch.float32, name


def test_forward_mode_and_zeroth_order_twins_use_the_same_directions(objective):
    """Methods of one name differ in their oracle only, so float64 estimates nearly agree."""
    methods, compared = load_plan().catalog.methods, 0
    for name, method in methods.items():
        twin = name.replace("fmad_", "zo_")
        if twin == name or twin not in methods:
            continue
        found = []
        for entry in (method, methods[twin]):
            estimator = entry.build()
            data = [batch(3, seed) for seed in range(len(estimator.passes(0)))]
            with Lift64():
                estimate = estimator.estimate(objective, data, Key(7, 0))
            found.append(estimate.gradient.clone())
        assert float((found[0] - found[1]).norm()) < 1e-3 * float(found[0].norm()), name
        compared += 1
    assert compared == 7


def test_dropout_masks_are_shared_by_both_sides_of_a_difference(monkeypatch):
    monkeypatch.chdir(ROOT)
    objective = encoder(dropout=0.3)
    with objective.noise(KEY):
        _, gradient = reference(objective, batch())
    with Lift64():
        estimate = Projected(Central(1e-6), Gaussian(), 2).estimate(objective, [batch()], KEY)
    wanted = Gaussian().draw(objective, KEY, 2).dense @ gradient
    torch.testing.assert_close(estimate.derivatives, wanted, rtol=1e-5, atol=1e-6)
    with objective.noise(KEY.at(0)):
        other, _ = reference(objective, batch())
    assert abs(float(other - estimate.loss)) > 1e-4


# --- an estimator of the user's own --------------------------------------------------------------

OWN = """
import torch
from torch import nn
from costbp.estimators import Estimate, Estimator

class Constant(Estimator):
    def __init__(self, value):
        self.value = value

    def estimate(self, objective, batches, key):
        loss = objective.value(batches[0]).detach()
        return Estimate(torch.full_like(objective.theta, self.value), loss, loss.new_empty(0))

def build(value=1.0):
    return Constant(value)

def wrong():
    return 3
"""


def own(tmp_path, **options):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return PythonSpec(kind="python", file=file, **options)


def test_an_estimator_from_a_file(objective, tmp_path):
    spec = own(tmp_path, options={"value": 0.5})
    estimate = spec.build().estimate(objective, [batch()], KEY)
    assert set(estimate.gradient.tolist()) == {0.5}
    before = spec.checksum
    (tmp_path / "own.py").write_text(OWN + "# changed")
    assert spec.checksum != before


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("missing", "has no function 'missing'"),
        ("wrong", "must return a costbp.estimators.Estimator, not"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, function, words):
    with pytest.raises(UserError, match=words) as caught:
        own(tmp_path, function=function).build()
    assert "\n" not in str(caught.value) and "own.py" in str(caught.value)


class InPlace(nn.Module):
    """Sums and products of which one part has no tangent, changed in place afterwards; broadcast, and
    by plain numbers from either side."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.register_buffer("row", torch.randn(3, dtype=torch.float64))

    def forward(self, data):
        x = data["features"] @ self.weight
        shifted = x + self.row
        shifted.mul_(x)  # must leave x's tangent alone
        scaled = self.row.view(1, 1, 3) * x + 2
        scaled.add_(1).mul_(2)
        return (x + 1.5) * (2 * shifted + self.row * scaled[0]) + self.row


@pytest.mark.parametrize("count", [1, 3])
def test_operators_with_one_tangent_are_exact_and_share_no_memory(count):
    torch.manual_seed(1)
    objective = Objective(InPlace(), class_loss)
    data = examples(5)
    directions = Gaussian().draw(objective, Key(0, 0), count)
    _, derivatives = Exact()(objective, data, directions)
    _, gradient = reference(objective, data)
    wanted = directions.dense @ gradient
    assert torch.allclose(derivatives, wanted, rtol=1e-12, atol=1e-14)
