"""Packed weights and chunked losses: the same function as the plain ones, in every mode."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from benchmarks.families import family_source
from costbp.config.load import overlaid
from costbp.config.sources import ConfigSource
from costbp.config.trainables import LoraTraining
from costbp.cost.bench import Bench
from costbp.errors import UserError
from costbp.estimators.forward_mode import directional_derivatives
from costbp.models.architecture import sample_batch, transformers_config
from costbp.models.build import build_from_config
from costbp.models.packed import QuantisedLinear, dequantise
from costbp.models.weights import _notice_attention
from tests.entries import METHODS, lora, small


@pytest.fixture
def layers():
    torch.manual_seed(0)
    plain = nn.Linear(64, 24, dtype=torch.float64)
    packed = QuantisedLinear(plain, 16)
    weight = dequantise(packed.qweight, packed.scales)
    return plain, packed, weight


def test_rounding_is_to_the_nearest_of_sixteen_levels(layers):
    plain, packed, weight = layers
    step = plain.weight.unflatten(1, (-1, 16)).abs().amax(2, keepdim=True) / 7
    error = (weight - plain.weight).unflatten(1, (-1, 16)).abs()
    assert bool((error <= step / 2 * (1 + 1e-9)).all())
    assert packed.qweight.nbytes == 64 * 24 // 2 and packed.scales.shape == (24, 4)


def test_a_packed_layer_is_its_unpacked_weight_in_every_mode(layers):
    _, packed, weight = layers
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    value = packed(x)
    torch.testing.assert_close(value, F.linear(x, weight, packed.bias))
    (gradient,) = torch.autograd.grad(value.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * value @ weight)
    tangent = torch.randn(3, 64, dtype=torch.float64)
    with torch.no_grad(), fwad.dual_level():
        slope = fwad.unpack_dual(packed(fwad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(slope, tangent @ weight.T)
    many = torch.randn(4, 3, 64, dtype=torch.float64)
    torch.testing.assert_close(vmap(packed)(many), packed(many))


def test_forward_mode_on_a_packed_base_is_right():
    source = family_source("llama", hidden=32, heads=2, vocabulary=64)
    source = source.model_copy(update={"bits": 4, "group": 16})
    objective = build_from_config(source, lora("llama"), adapters_at_zero=False)
    data = sample_batch(transformers_config(source.config), source.form, 2, 8)
    assert any(isinstance(m, QuantisedLinear) for m in objective.module.modules())
    z = torch.randn(3, objective.d)
    _, gradient = objective.gradient(data)
    for count in (1, 3):
        _, slopes = directional_derivatives(objective, data, z[:count])
        torch.testing.assert_close(slopes, z[:count] @ gradient, rtol=2e-4, atol=1e-5)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
OTHERS = {  # families that the study has not: their configuration, and what adapters go to
    "falcon": (SIZES, "query_key_value"),
    "gpt_neox": ({**SIZES, "intermediate_size": 64}, "query_key_value"),
    "gemma2": (GROUPED, "q_proj"),
    "gpt2": (SIZES, "c_attn"),
    "qwen2_moe": (
        {
            **GROUPED,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
        "q_proj",
    ),
}


def causal(family, **options):
    """A small language model's source, and adapters for it."""
    if family not in OTHERS:
        source, train = family_source(family, hidden=32, heads=2, vocabulary=64), lora(family)
    else:
        config, target = OTHERS[family]
        config = {"model_type": family, "attention_dropout": 0.0, "hidden_dropout": 0.0, **config}
        source = ConfigSource(kind="config", form="causal", dtype="float32", config=config)
        train = LoraTraining(kind="lora", rank=1, alpha=1, dropout=0.0, targets=(target,))
    return source.model_copy(update=options), train


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2_vl", "falcon", "gpt_neox"])
def test_a_chunked_loss_is_the_same_function(family):
    source, train = causal(family)
    data = sample_batch(transformers_config(source.config), source.form, 2, 12)
    found = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        source = source.model_copy(update={"loss_chunk": chunk})
        objective = build_from_config(source, train, adapters_at_zero=False)
        loss, gradient = objective.gradient(data)
        z = torch.ones(2, objective.d)
        slopes = directional_derivatives(objective, data, z)[1]
        found.append(
            (loss, gradient.clone(), slopes, directional_derivatives(objective, data, z[:1])[1])
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_chunked_loss_is_refused_where_logits_are_not_the_head_s(plan):
    with pytest.raises(UserError, match=r"loss_chunk: a 'gemma2' .*\(final_logit_softcapping = 30"):
        build_from_config(*causal("gemma2", loss_chunk=5))
    with pytest.raises(UserError, match="loss_chunk splits the logits of tokens, which a classif"):
        overlaid(plan.catalog.models["bert_base"], {"source.loss_chunk": 5}, "test")


def test_falcon_s_own_linear_layers_are_packed():
    """Their class computes the product by itself."""
    source, train = causal("falcon", bits=4, group=16)
    objective = build_from_config(source, train, adapters_at_zero=False)
    packed = [m for m in objective.module.modules() if isinstance(m, QuantisedLinear)]
    assert len(packed) == 8
    data = sample_batch(transformers_config(source.config), source.form, 2, 8)
    z = torch.randn(3, objective.d)
    _, gradient = objective.gradient(data)
    _, slopes = directional_derivatives(objective, data, z)
    torch.testing.assert_close(slopes, z @ gradient, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "what"), [("gpt2", "Conv1D"), ("qwen2_moe", "Experts")])
def test_four_bits_are_refused_where_they_would_pack_little(family, what):
    with pytest.raises(UserError, match=rf"bits = 4 packs linear layers, and .*{what}\): leave"):
        build_from_config(*causal(family, bits=4, group=16))


def test_a_head_by_another_name_stays():
    objective = build_from_config(*causal("gpt_neox", bits=4, group=16))
    head = objective.module.model.get_base_model().get_output_embeddings()
    assert type(head) is nn.Linear


def test_where_attention_is_not_fused_a_notice_says_so(capsys):
    _notice_attention.cache_clear()
    for family in ("gemma2", "gemma2", "llama"):
        build_from_config(*causal(family))
    told = capsys.readouterr().err
    assert told.count("notice: transformers has no fused attention for 'gemma2'") == 1
    assert "llama" not in told
    _notice_attention.cache_clear()
    build_from_config(*causal("gemma2", attention="eager"))
    assert capsys.readouterr().err == ""


def test_a_chunked_loss_lowers_every_method_s_peak(plan):
    entry = small("llama", vocabulary=8192, hidden=64)
    chunked = overlaid(entry, {"source.loss_chunk": 16}, "test")
    for name in METHODS:
        whole, part = (
            Bench(e).cost(name, plan.catalog.methods[name], 4, 32).peak_by_category
            for e in (entry, chunked)
        )
        assert part["logits and loss"] < whole["logits and loss"] / 4, name
