"""Oracles and memory plans on the five architectures, against reverse mode in float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import FAMILIES
from costbp.errors import UserError
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import Gaussian
from costbp.estimators.guess import LocalGuess
from costbp.estimators.hessian_informed import HessianInformed
from costbp.estimators.memory_plans import PLANS, ByteBudget, blocks
from costbp.estimators.oracles import Central, Exact, OneSided
from costbp.estimators.projected import Projected
from costbp.meter import Meter
from costbp.models.loss import cross_entropy
from costbp.objective import Key, Objective
from tests.conftest import Lift64
from tests.small import ON_CPU, in_dtype, reference, small_model

KEY = Key(7, 3)
DIFFERENCES = {
    "looped": Central(1e-6, "never"),
    "batched": Central(1e-6, "always"),
    "one-sided": OneSided(1e-8, "never"),
    "one-sided batched": OneSided(1e-8, "always"),
}
families = pytest.mark.parametrize("family", FAMILIES)


def distance(found, wanted):
    """Largest difference, as a share of the largest entry."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


# --- derivatives -------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("train", ["lora", "head", "full"])
def test_exact_derivatives_equal_reverse_mode(family, train):
    objective, data = small_model(family, train=train)
    loss, gradient = reference(objective, data)
    for count, chunk in ((1, None), (3, None), (3, 2)):
        directions = Gaussian().draw(objective, KEY, count)
        with Lift64():
            value, derivatives = Exact(chunk)(objective, data, directions)
        assert distance(derivatives, directions.dense @ gradient) < 1e-12, (count, chunk)
        assert distance(value, loss) < 1e-14
        assert derivatives.shape == (count,)


@families
def test_differences_are_near_reverse_mode_looped_and_batched(family):
    objective, data = small_model(family)
    loss, gradient = reference(objective, data)
    directions = Gaussian().draw(objective, KEY, 3)
    found = {}
    for name, oracle in DIFFERENCES.items():
        with Lift64():
            value, found[name] = oracle(objective, data, directions)
        # rounding at eps = 1e-8 leaves eight digits fewer than the loss has
        assert distance(found[name], directions.dense @ gradient) < 1e-5, name
        assert distance(value, loss) < 1e-9, name
    rounding = 10 * torch.finfo(torch.float64).eps * float(loss)
    assert (found["looped"] - found["batched"]).abs().max() < rounding / 1e-6
    assert (found["one-sided"] - found["one-sided batched"]).abs().max() < rounding / 1e-8


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_oracle_changes_a_bit_of_the_model(family, dtype):
    objective, data = small_model(family, dtype)
    before = {name: value.clone() for name, value in objective.module.state_dict().items()}
    theta = objective.theta.clone()
    directions = Gaussian().draw(objective, KEY, 2)
    for oracle in (Exact(), *DIFFERENCES.values()):
        value, derivatives = oracle(objective, data, directions)
        assert value.dtype == derivatives.dtype == torch.float32
        assert torch.equal(objective.theta, theta)
        for name, tensor in objective.module.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@families
def test_bfloat16_forward_mode_is_near_float32(family):
    objective, data = small_model(family, torch.bfloat16)
    directions = Gaussian().draw(objective, KEY, 4)
    _, rough = Exact()(objective, data, directions)
    precise, data = in_dtype(objective, data, torch.float64)
    _, gradient = reference(precise, data)
    wanted = Gaussian().draw(precise, KEY, 4).dense @ gradient
    assert float((rough - wanted).abs().max()) < 0.05 * float(gradient.norm())


@families
@pytest.mark.parametrize("train", ["lora", "full"])
def test_fused_attention_gives_the_gradient_of_eager(family, train):
    models = {a: small_model(family, train=train, attention=a) for a in ("sdpa", "eager")}
    data = models["eager"][1]
    (loss, gradient), (wanted, slope) = (reference(model, data) for model, _ in models.values())
    assert distance(loss, wanted) < 1e-13
    assert distance(gradient, slope) < 1e-12


# --- dropout -----------------------------------------------------------------------------------


@families
def test_one_dropout_mask_serves_an_estimate(family):
    objective, data = small_model(family, dropout=0.3)
    with objective.noise(KEY):
        loss, gradient = reference(objective, data)
        directions = Gaussian().draw(objective, KEY, 3)
        for oracle in (Exact(), Exact(2), *DIFFERENCES.values()):
            with Lift64():
                value, derivatives = oracle(objective, data, directions)
            assert distance(derivatives, directions.dense @ gradient) < 1e-5, oracle
            assert distance(value, loss) < 1e-9, oracle
    with objective.noise(KEY.at(1)):
        other, _ = reference(objective, data)
    assert distance(other, loss) > 1e-6  # the masks do matter here


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_dropout_by_a_rate_of_the_module_s_own_is_shared_too(family):
    """Their blocks hand a float to the functional form; no ``nn.Dropout`` is there to be seen."""
    module = small_model(family)[0].module
    for part in module.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 0.3)
    objective, data = Objective(module, cross_entropy), small_model(family)[1]
    with objective.noise(KEY):
        loss, again = (reference(objective, data)[0] for _ in range(2))
    with objective.noise(KEY.at(1)):
        other, _ = reference(objective, data)
    assert torch.equal(loss, again)
    assert distance(other, loss) > 1e-6


# --- memory plans ------------------------------------------------------------------------------


def estimated(plan, objective, data):
    """Gradient, FLOPs and peak bytes of one estimate, and the bytes it left behind."""
    with Meter([*objective.existing(), *data.values()]) as meter:
        gradient = Backprop(plan).estimate(objective, [data], KEY).gradient
    return gradient.clone(), meter.flops, meter.peak, meter.live


@families
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"train": "full"}], ids=str)
def test_memory_plans_change_no_bit_and_save_memory(family, options):
    for layers in (4, 3) if family == "qwen2_vl" else (4,):
        objective, data = small_model(family, torch.float32, layers=layers, **options)
        plain, flops, peak, nothing = estimated(PLANS["none"], objective, data)
        for name in ("per_block", "sub_layer", "selective"):
            gradient, spent, needed, left = estimated(PLANS[name], objective, data)
            assert torch.equal(gradient, plain), name
            assert left == nothing, name
            recomputes = name != "selective"
            assert (spent > flops) == recomputes, name  # `selective` keeps all products
            # frozen layers' products need not be kept, so `selective` pays where all is trained
            if recomputes or options.get("train") == "full":
                assert needed < peak, name


@families
def test_a_byte_budget_is_kept_and_used(family):
    objective, data = small_model(family, torch.float32, layers=4)
    plain, flops, peak, _ = estimated(PLANS["none"], objective, data)
    least = ByteBudget._peak(objective, data, blocks(objective.module))
    assert least < peak
    spent = {}
    for share in (0, 0.5):
        allowed = (least + share * (peak - least)) / 2**20
        gradient, spent[share], needed, _ = estimated(ByteBudget(allowed), objective, data)
        assert torch.equal(gradient, plain)
        assert needed <= allowed * 2**20
    assert spent[0] > spent[0.5] > flops


@families
def test_an_impossible_byte_budget_names_the_need(family):
    objective, data = small_model(family, torch.float32)
    least = ByteBudget._peak(objective, data, blocks(objective.module)) / 2**20
    with pytest.raises(UserError, match=rf"needs {least:.1f} MiB") as caught:
        Backprop(ByteBudget(0.001)).estimate(objective, [data], KEY)
    assert "\n" not in str(caught.value)
    assert not any("forward" in vars(block) for block in blocks(objective.module))


@families
@pytest.mark.parametrize("plan", [*ON_CPU.values(), ByteBudget(64)], ids=[*ON_CPU, "byte_budget"])
def test_forwards_are_restored_even_after_an_exception(family, plan):
    objective, data = small_model(family, torch.float32, layers=4)
    found = blocks(objective.module)
    with pytest.raises(ZeroDivisionError), plan(objective, data):
        objective.value(data)
        raise ZeroDivisionError
    assert not any("forward" in vars(block) for block in found)
    objective.loss = lambda logits, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        LocalGuess(Exact()).estimate(objective, [data], KEY)
    assert not any("forward" in vars(block) for block in found)


# --- what is left behind -----------------------------------------------------------------------


@families
def test_no_graph_is_left_behind(family):
    objective, data = small_model(family, torch.float32)
    oracles = [Exact(), Central(1e-3, "never"), Central(1e-3, "always"), OneSided(1e-3, "never")]
    estimators = [Backprop(plan) for plan in ON_CPU.values()]
    estimators += [Projected(oracle, Gaussian(), 2) for oracle in oracles]
    estimators += [HessianInformed(Central(1e-3), 1e-3), LocalGuess(Exact())]
    for estimator in estimators:
        estimate = estimator.estimate(objective, [data], KEY)
        for tensor in (estimate.gradient, estimate.loss, estimate.derivatives):
            assert not tensor.requires_grad and tensor.grad_fn is None, estimator
        assert estimate.gradient.isfinite().all() and estimate.gradient.any()
