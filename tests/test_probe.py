"""Steps and precision of differences, settled before a run against exact derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from benchmarks.families import FAMILIES, family_batch, family_objective, family_source
from costbp.config.load import load_plan
from costbp.config.optimizer import LEAST_RATE, OptimizerSpec
from costbp.config.trainables import LoraTraining
from costbp.estimators.directions import Gaussian
from costbp.estimators.oracles import Central, Exact, OneSided, _moving, _one, losses_at
from costbp.estimators.precision import float32_products
from costbp.estimators.probe import GOOD, settle
from costbp.estimators.projected import Projected
from costbp.models.build import build_from_config
from costbp.models.packed import PackedLinear
from costbp.objective import Key, Objective
from costbp.train.record import NOISE
from tests.conftest import ROOT
from tests.small import class_loss, examples
from tests.test_refusals import OPERATORS, Stack

KEY = Key(3, 0)
SIZE = {"hidden": 64, "layers": 3, "heads": 4, "vocabulary": 256}


@pytest.fixture(scope="module")
def methods():
    return load_plan(base=ROOT / "config/config.yaml").catalog.methods


def half(family, dtype=torch.bfloat16, **options):
    """A base in half precision with adapters in float32, as peft keeps them, at B = 0."""
    objective = family_objective(family, **SIZE | options)
    for parameter in objective.module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for name, parameter in objective.module.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return objective, family_batch(family, 8, 24, SIZE["vocabulary"])


def widened(objective):
    """The same model with every weight in float32: what its losses are in exact arithmetic, nearly."""
    return Objective(copy.deepcopy(objective.module).float(), objective.loss)


def cosine(estimator, objective, data, against):
    """Of the estimator's differences to exact derivatives in float32, along fresh directions."""
    directions = Gaussian().draw(objective, Key(9, 9), 8)
    found = estimator.difference(objective, data, directions)[1]
    truth = Exact()(against, data, Gaussian().draw(against, Key(9, 9), 8))[1]
    return float(torch.cosine_similarity(found.double(), truth.double(), dim=0))


@pytest.mark.parametrize(
    "name",
    [
        "zo_vanilla",
        "fzoo",
        "hizoo",
        "zo_sparse",
        "zo_adaptive",
        "zo_svrg",
        "zo_accumulate",
        "zo_sign",
    ],
)
def test_in_float32_the_usual_step_stays(methods, name):
    objective, data = half("llama", torch.float32)
    theta, estimator = objective.theta.clone(), methods[name].build()
    probe = settle(objective, estimator, data, KEY)
    assert (probe.eps, probe.float32) == (1e-3, False)
    assert probe.error < 0.05 and probe.cosine > 0.998 and probe.snr > 400
    taken = 1 + 4 if name == "fzoo" else 2 * 4
    assert probe.forwards == taken + 2 * 4  # and four exact derivatives
    assert torch.equal(objective.theta, theta)
    assert not estimator.state_dict()  # nothing is remembered, no mask chosen


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_base_in_bfloat16_gets_differences_that_follow_the_derivative(methods, family, rank):
    objective, data = half(family, rank=rank)
    exact = widened(objective)
    for name in ("zo_vanilla", "fzoo"):
        untold, estimator = (methods[name].build() for _ in range(2))
        probe = settle(objective, estimator, data, KEY)
        assert probe.error <= GOOD
        after = cosine(estimator, objective, data, exact)
        assert after > 0.9, probe
        assert cosine(untold, objective, data, exact) < after or probe.forwards < 20


def test_a_step_that_an_entry_fixes_is_kept_and_measured():
    objective, data = half("llama", torch.float32)
    estimator = Projected(Central(1e-8), Gaussian())
    probe = settle(objective, estimator, data, KEY)
    assert (probe.eps, probe.float32) == (1e-8, False) and probe.snr <= NOISE
    assert estimator.difference.step == 1e-8


def test_estimators_of_exact_derivatives_settle_nothing(methods):
    objective, data = half("llama", torch.float32)
    for name in ("bp_checkpointing", "fmad_multiple", "fmad_guess"):
        assert settle(objective, methods[name].build(), data, KEY) is None


def test_a_step_far_too_long_is_shortened():
    """A loss that bends within a thousandth: the error of 1e-3 is the third derivative's."""
    torch.manual_seed(0)
    objective = Objective(Stack(torch.tanh), lambda out, batch: (3000 * out).sin().mean())
    estimator = Projected(Central(), Gaussian())
    probe = settle(objective, estimator, examples(), KEY)
    assert probe.eps < 1e-3 and probe.error <= GOOD


@pytest.mark.parametrize("oracle", [Central, OneSided])
def test_without_a_forward_rule_neighbouring_steps_decide(oracle):
    objective = Objective(Stack(OPERATORS["Doubled"]), class_loss)
    estimator = Projected(oracle(batched="never"), Gaussian())
    probe = settle(objective, estimator, examples(), KEY)
    assert probe.cosine is None and probe.error < GOOD
    _, gradient = objective.gradient(examples())
    directions = Gaussian().draw(objective, KEY, 3)
    slopes = estimator.oracle(objective, examples(), directions)[1]
    assert torch.allclose(slopes, directions.dense @ gradient, rtol=0.05, atol=1e-3)


def test_no_room_for_exact_derivatives_is_no_failure(monkeypatch):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Exact, "__call__", no_room)
    objective, data = half("llama", torch.float32)
    assert settle(objective, Projected(Central(), Gaussian()), data, KEY).cosine is None


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_products_are_those_of_a_model_in_float32(family):
    objective, data = half(family)
    exact = widened(objective)
    with torch.no_grad():
        wanted = exact.value(data)
        rough = objective.value(data)
        with float32_products():
            found = objective.value(data)
        again = objective.value(data)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert abs(rough - wanted) > abs(found - wanted)
    assert torch.equal(again, rough)  # and afterwards all is as before


def test_float32_products_reach_into_packed_layers():
    source = family_source("llama", **SIZE).model_copy(
        update={"bits": 4, "group": 16, "dtype": "bfloat16"}
    )
    train = LoraTraining(kind="lora", rank=2, alpha=1, targets=["q_proj", "v_proj"])
    objective = build_from_config(source, train)
    packed = [m for m in objective.module.modules() if isinstance(m, PackedLinear)]
    seen = []
    for layer in packed:
        layer.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    with torch.no_grad(), float32_products():
        objective.value(family_batch("llama", 2, 16, SIZE["vocabulary"]))
    assert len(seen) == len(packed) > 0 and set(seen) == {torch.float32}


# --- where theta is moved ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_theta_and_perturbing_operators_give_the_same_bits(family):
    objective = family_objective(family, **SIZE)
    data = family_batch(family, 2, 16, SIZE["vocabulary"])
    directions = Gaussian().draw(objective, KEY, 2)
    theta, steps = objective.theta.clone(), (1e-2, -1e-2)
    with torch.no_grad():
        moved = _moving(objective, data, directions, steps)
        assert torch.equal(objective.theta, theta)
        for row, step in zip(moved, steps, strict=True):
            for k in range(2):
                assert torch.equal(row[k], _one(objective, data, directions, k, step))
    assert torch.equal(losses_at(objective, data, directions, steps, "never"), moved)


@pytest.mark.parametrize(
    "name", ["zo_vanilla", "zo_multiple", "hizoo", "fmad_vanilla", "fmad_multiple"]
)
def test_no_mode_sees_the_operators_of_a_step_with_adapters(methods, name):
    """Every mode costs Python in each operator, which a small model's time consists of."""
    objective = family_objective("llama", **SIZE)
    data = family_batch("llama", 8, 24, SIZE["vocabulary"])  # too many tokens to be batched
    seen = []
    for module in objective.module.modules():
        module.register_forward_pre_hook(
            lambda m, i: seen.append(len(_get_current_function_mode_stack()))
        )
    methods[name].build().estimate(objective, [data], KEY)
    assert seen and not any(seen)


def test_theta_that_outweighs_the_activations_is_not_copied():
    objective = family_objective(
        "llama", train="full", hidden=96, layers=3, heads=4, vocabulary=256
    )
    data = family_batch("llama", 1, 16, 256)
    copies = []
    plain = objective.returning
    objective.returning = lambda: copies.append(1) or plain()
    directions = Gaussian().draw(objective, KEY, 1)
    losses_at(objective, data, directions, (1e-3,), "never")
    assert not copies


# --- learning rates ------------------------------------------------------------------------------


def test_rates_fall_with_d_to_a_floor():
    spec = OptimizerSpec(name="sgd", lr=1e-2, falls_from=10_000)
    assert [spec.rate(d) for d in (10, 10_000, 20_000, 10**6)] == [1e-2, 1e-2, 5e-3, 1e-4]
    assert spec.rate(10**9) == LEAST_RATE
    assert OptimizerSpec(name="sgd", lr=1e-6, falls_from=100).rate(10**9) == 1e-6
    assert OptimizerSpec(lr=2e-3).rate(10**9) == 2e-3


def test_defaults_of_long_vectors_are_inside_what_is_published(methods):
    """1e-5 to 1e-3 at d of about 1e6, with adapters."""
    for name, method in methods.items():
        if method.family == "bp":
            continue
        for d in (630_532, 1_152_004):
            assert 1e-5 <= method.optimizer.rate(d) <= 1e-3, name
