"""Costs traced without weights: against the CPU, hand counts and published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.families import CLASSIFIERS, FAMILIES, family_source
from costbp.config.catalog import ModelEntry
from costbp.config.load import overlaid
from costbp.config.trainables import FullTraining
from costbp.cost.bench import Bench
from costbp.cost.weightless import META, MissingNumbersError, weightless
from costbp.errors import UserError
from costbp.meter import Meter, counted
from tests.closed_form_memory import peak_bytes
from tests.entries import METHODS, lora, small

# parameters: as the models' cards and papers count them (encoders with the study's head of 4
# classes, and BERT's pooler; RoBERTa's classifier has a dense layer instead); d: the study's code
PUBLISHED = {
    "bert_base": (109_482_240 + 3_076, 39_940),
    "bert_large": (335_141_888 + 4_100, 102_404),
    "roberta_base": (124_645_632 + 3_076, 630_532),
    "roberta_large": (355_359_744 + 4_100, 1_152_004),
    "opt_1_3b": (1_315_758_080 + 8_192, 204_800),
    "opt_6_7b": (6_658_473_984 + 16_384, 540_672),
    "opt_13b": (12_853_473_280 + 20_480, 839_680),
    "llama_3_1_8b": (8_030_261_248, 425_984),
    "qwen2_vl_7b": (8_291_375_616, 630_784),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_nine_models_have_their_published_sizes(plan, name):
    bench = Bench(plan.catalog.models[name])
    assert (bench.parameters, bench.objective.d) == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_counts_what_runs_on_the_cpu(plan, family):
    entry = small(family)
    traced, real = Bench(entry), Bench(entry, "cpu")
    for name in (*METHODS, "fmad_multiple", "zo_svrg", "fmad_adaptive", "zo_sparse", "hizoo"):
        method = plan.catalog.methods[name]
        one, other = (bench.cost(name, method, 2, 32, timed=False) for bench in (traced, real))
        for key in ("flops", "forward_flops", "state_bytes", "weights_bytes", "d"):
            assert getattr(one, key) == getattr(other, key), (name, key)
        # integers stay on the CPU in both; only tensors of a few bytes may differ
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=2e-3, abs=256), name


def test_seconds_are_those_of_a_device(plan):
    method = plan.catalog.methods["zo_vanilla"]
    found = {d: Bench(small("bert", layers=1), d).cost("x", method, 1, 8) for d in ("meta", "cpu")}
    assert found["meta"].seconds is None and found["cpu"].seconds > 0


@pytest.mark.parametrize(
    ("family", "train"), [*((f, "lora") for f in FAMILIES), *((f, "full") for f in FAMILIES[:-1])]
)
def test_units_are_those_of_products_counted_by_hand(plan, family, train):
    entry = small(family, FullTraining(kind="full") if train == "full" else None, layers=5)
    bench = Bench(entry)
    for name in (
        "bp_vanilla",
        "bp_checkpointing",
        "bp_sublayer",
        "fmad_multiple",
        "zo_vanilla",
        "fzoo",
    ):
        cost = bench.cost(name, plan.catalog.methods[name], 3, 32)
        assert cost.beyond == cost.peak_bytes + cost.state_bytes
        # forward mode also multiplies by the first block's keys, whose tangents are zeros
        loose = 0.005 if name.startswith("fmad") else 1e-6
        assert cost.closed_form == pytest.approx(cost.forward_units, rel=loose), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, "float32") for f in FAMILIES), *((f, "bfloat16") for f in FAMILIES[2:])],
)
@pytest.mark.parametrize("length", [32, 256])
def test_bytes_are_those_of_the_closed_form(plan, family, dtype, length):
    sizes = {"hidden": 512, "inner": 1536, "layers": 6, "heads": 8, "vocabulary": 6000}
    update = {"dtype": dtype, "attention": "eager"}
    source = family_source(family, **sizes).model_copy(update=update)
    train = lora(family, dropout=0.1)
    bench = Bench(ModelEntry(label=family, source=source, train=train))
    steps = {
        "bp_vanilla": "backprop",
        "bp_checkpointing": "per_block",
        "zo_vanilla": "forward",
        "fmad_vanilla": "forward_mode",
    }
    encoder = family in CLASSIFIERS
    for name, step in steps.items():
        cost = bench.cost(name, plan.catalog.methods[name], 8, length)
        expected = peak_bytes(source, train, step, 8, length)
        loose = 0.25 if encoder and name == "fmad_vanilla" else 0.06 if encoder else 0.03
        assert expected == pytest.approx(cost.peak_bytes, rel=loose), name


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_first_block_keeps_less(plan, family):
    source = family_source(family, hidden=512, inner=1536, layers=1, heads=8, vocabulary=64)
    source = source.model_copy(update={"attention": "eager"})
    bench = Bench(ModelEntry(label=family, source=source, train=lora(family)))
    cost = bench.cost("x", plan.catalog.methods["bp_vanilla"], 8, 64)
    expected = peak_bytes(source, lora(family), "backprop", 8, 64)
    assert expected == pytest.approx(cost.peak_bytes, rel=0.03)


def test_a_two_block_model_by_hand(plan):
    hidden, inner, rank, batch, length, classes = 32, 128, 2, 2, 12, 4
    entry = small("bert", layers=2)
    tokens = batch * length
    linear = 2 * tokens * (4 * hidden**2 + 2 * hidden * inner)
    attention = 2 * 2 * tokens * length * hidden
    adapters = 2 * (2 * tokens * 2 * hidden * rank)
    head = 2 * batch * (hidden**2 + hidden * classes)
    forward = 2 * (linear + attention + adapters) + head
    first = 2 * tokens * 3 * hidden**2  # q, k, v of the first block: the input has no gradient
    a = 2 * tokens * 2 * hidden * rank  # LoRA's first factors there: one live factor instead of two
    live = 2 * (linear + 2.5 * attention + 2 * adapters) - first - a  # fused: five products for two
    live += 2 * batch * (hidden**2 + 2 * hidden * classes)
    found = Bench(entry).cost("bp_vanilla", plan.catalog.methods["bp_vanilla"], batch, length)
    assert found.forward_flops == forward
    assert found.flops == forward + live


def test_llama_at_full_size(plan):
    bf16 = {"source.bits": None, "train.dropout": 0.0}
    bench = Bench(overlaid(plan.catalog.models["llama_3_1_8b"], bf16, "test"))
    expected = {"bp_vanilla": 2.00, "bp_checkpointing": 2.66, "fmad_vanilla": 2.00, "zo_vanilla": 2}
    found = {n: bench.cost(n, plan.catalog.methods[n], 8, 64) for n in expected}
    assert {n: round(c.forward_units, 2) for n, c in found.items()} == expected
    assert found["bp_vanilla"].forward_flops == pytest.approx(7.70e12, rel=1e-3)
    beyond = {name: cost.peak_bytes for name, cost in found.items()}
    assert beyond["bp_checkpointing"] < beyond["fmad_vanilla"] < beyond["bp_vanilla"]
    assert found["zo_vanilla"].weights_bytes == pytest.approx(2 * 8_030_261_248, rel=1e-6)


def test_four_bit_weights_count_half_a_byte_and_their_scales(plan):
    packed = Bench(plan.catalog.models["opt_1_3b"])
    cost = packed.cost("zo_vanilla", plan.catalog.methods["zo_vanilla"], 2, 16)
    blocks = 24 * (4 * 2048**2 + 2 * 2048 * 8192)
    rest = packed.parameters - blocks
    assert cost.weights_bytes == pytest.approx(blocks * (0.5 + 2 / 128) + 2 * rest, rel=1e-3)
    largest_layer = 2048 * 8192
    assert cost.peak_by_category["temporary"] >= 2 * largest_layer  # unpacked for its product


@pytest.mark.parametrize("name", ["opt", "llama", "qwen2_vl"])
def test_every_method_runs_on_a_packed_base(plan, name):
    entry = small(name, lora(name, dropout=0.1), layers=2, hidden=32)
    entry = overlaid(entry, {"source.bits": 4, "source.group": 16, "source.dtype": "bfloat16"}, "t")
    bench = Bench(entry)
    keys = (
        "bp_checkpointing",
        "bp_sublayer",
        "fmad_vanilla",
        "fmad_multiple",
        "zo_vanilla",
        "fzoo",
    )
    for key in keys:
        cost = bench.cost(key, plan.catalog.methods[key], 4, 32)
        loose = 0.02 if key.startswith("fmad") else 1e-6
        assert cost.closed_form == pytest.approx(cost.forward_units, rel=loose), key


def test_categories_add_up_and_say_what_is_known(plan):
    entry = small("llama", vocabulary=2048, layers=4)
    bench = Bench(entry)
    costs = {n: bench.cost(n, plan.catalog.methods[n], 2, 32) for n in (*METHODS, "fmad_multiple")}
    for cost in costs.values():
        whole = sum(cost.peak_by_category.values())
        assert whole == cost.peak_bytes + cost.state_bytes + cost.weights_bytes
    logits = 2 * 32 * 2048 * 4
    assert costs["zo_vanilla"].peak_by_category["logits and loss"] >= 2 * logits
    kept = {name: cost.peak_by_category.get("saved activations", 0) for name, cost in costs.items()}
    assert kept["bp_checkpointing"] < kept["bp_selective"] < kept["bp_vanilla"]
    assert kept["zo_vanilla"] == kept["fmad_vanilla"] == 0
    one, many = (costs[n].peak_by_category for n in ("fmad_vanilla", "fmad_multiple"))
    assert many["directions"] == pytest.approx(8 * one["directions"], rel=0.01)


def test_tangents_are_told_from_activations(plan):
    bench = Bench(small("bert", layers=4))
    one, many, none = (
        bench.cost(name, plan.catalog.methods[name], 2, 32).peak_by_category.get("tangents", 0)
        for name in ("fmad_vanilla", "fmad_multiple", "zo_vanilla")
    )
    hidden = 2 * 32 * 32 * 4
    assert one >= 2 * hidden and many >= 6 * one and none == 0


def test_work_within_a_meter_can_stay_unseen_or_stand_for_more():
    a = torch.ones(3, 3)
    with Meter() as outer:
        torch.ones(10)
        with counted(0), Meter() as inner:
            torch.ones(1000)
            a @ a
        with counted(5):
            a @ a
    assert (outer.peak, inner.peak) == (40, 4000)
    assert (outer.flops, inner.flops) == (5 * 54, 54)


def test_numbers_that_are_not_there():
    with weightless():
        value = torch.randn(3)
        assert value.device == META and torch.arange(3).device.type == "cpu"
        assert float(value.sum()) == 1.0 and value.tolist() == [1.0, 1.0, 1.0]
        assert bool(torch.isfinite(value).all())
        assert value[torch.isfinite(value)].shape == (3,)
        with pytest.raises(MissingNumbersError, match="nonzero"):
            torch.nonzero(value > 0)


class Choosy(nn.Module):
    """Looks at numbers: how many are positive?"""

    def forward(self, x):
        return x[: len(torch.nonzero(x > 0))]


def test_a_module_that_needs_numbers_is_named(plan):
    bench = Bench(small("bert"))
    bench.objective.module.model.base_model.classifier.activation = Choosy()
    head = bench.objective.module.model.base_model.classifier
    head.register_forward_pre_hook(lambda module, inputs: module.activation(inputs[0]))
    with pytest.raises(UserError, match=r"module '.*activation' \(Choosy\): operator 'nonzero'"):
        bench.cost("x", plan.catalog.methods["zo_vanilla"], 2, 8)
