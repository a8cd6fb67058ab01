"""Costs traced without weights: against the CPU, hand counts and published sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from costbp.config import load_plan
from costbp.config.catalog import FullTraining, LoraTraining, ModelEntry
from costbp.config.load import overlaid
from costbp.errors import UserError
from costbp.estimators.forward_mode import directional_derivatives
from costbp.measure.meter import Meter, unseen
from costbp.measure.weightless import META, MissingNumbersError, weightless
from costbp.models.families import CLASSIFIERS, FAMILIES, family_source
from costbp.models.full_size import build_full_size, sample_batch, transformers_config
from costbp.models.quantised import QuantisedLinear, dequantise
from costbp.theory.cost import forward_units
from costbp.theory.memory import peak_bytes
from costbp.theory.products import products, shares
from costbp.train.fit import Fitting, cheapest_plan, largest, models_that_fit
from costbp.train.trace import Bench, entry_from_config
from tests.conftest import ROOT

METHODS = (
    "bp_vanilla",
    "bp_checkpointing",
    "bp_sqrt",
    "bp_selective",
    "fmad_vanilla",
    "zo_vanilla",
)

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


@pytest.fixture(scope="module")
def plan():
    import contextlib

    with contextlib.chdir(ROOT):
        return load_plan()


def lora(family, **options):
    targets = ("query", "value") if family in CLASSIFIERS else ("q_proj", "v_proj")
    return LoraTraining(kind="lora", rank=2, alpha=1, targets=targets, **options)


def small(family, train=None, **sizes):
    sizes = {"hidden": 32, "layers": 3, "heads": 2, "vocabulary": 64} | sizes
    source = family_source(family, **sizes)
    return ModelEntry(label=family, source=source, train=train or lora(family))


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
        one, other = (bench.cost(name, method, 2, 12, timed=False) for bench in (traced, real))
        for key in ("flops", "forward_flops", "state_bytes", "weights_bytes", "d"):
            assert one[key] == other[key], (name, key)
        # integers stay on the CPU in both; only tensors of a few bytes may differ
        assert one["peak_bytes"] == pytest.approx(other["peak_bytes"], rel=2e-3, abs=256), name


def test_seconds_are_those_of_a_device(plan):
    method = plan.catalog.methods["zo_vanilla"]
    found = {d: Bench(small("bert", layers=1), d).cost("x", method, 1, 8) for d in ("meta", "cpu")}
    assert found["meta"]["seconds"] is None and found["cpu"]["seconds"] > 0


@pytest.mark.parametrize(
    ("family", "train"), [*((f, "lora") for f in FAMILIES), *((f, "full") for f in FAMILIES[:-1])]
)
def test_units_are_those_of_products_counted_by_hand(plan, family, train):
    entry = small(family, FullTraining(kind="full") if train == "full" else None, layers=5)
    bench = Bench(entry)
    for name in (
        "bp_vanilla",
        "bp_checkpointing",
        "bp_sqrt",
        "fmad_multiple",
        "zo_vanilla",
        "fzoo",
    ):
        cost = bench.cost(name, plan.catalog.methods[name], 3, 32)
        # forward mode also multiplies by the first block's keys, whose tangents are zeros
        loose = 0.005 if name.startswith("fmad") else 1e-6
        assert cost["theory_units"] == pytest.approx(cost["forward_units"], rel=loose), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, "float32") for f in FAMILIES), *((f, "bfloat16") for f in FAMILIES[2:])],
)
@pytest.mark.parametrize("length", [32, 256])
def test_bytes_are_those_of_the_closed_form(plan, family, dtype, length):
    sizes = {"hidden": 512, "inner": 1536, "layers": 6, "heads": 8, "vocabulary": 6000}
    source = family_source(family, **sizes).model_copy(update={"dtype": dtype})
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
        assert expected == pytest.approx(cost["peak_bytes"], rel=loose), name


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
    key = attention / 2  # nor have its keys: one of two factors in the first product
    a = 2 * tokens * 2 * hidden * rank  # LoRA's first factors there: one live factor instead of two
    live = 2 * (linear + 2 * attention + 2 * adapters) - first - key - a
    live += 2 * batch * (hidden**2 + 2 * hidden * classes)
    found = Bench(entry).cost("bp_vanilla", plan.catalog.methods["bp_vanilla"], batch, length)
    assert found["forward_flops"] == forward
    assert found["flops"] == forward + live


def test_llama_at_full_size(plan):
    bf16 = {"source.bits": None, "train.dropout": 0.0}
    bench = Bench(overlaid(plan.catalog.models["llama_3_1_8b"], bf16, "test"))
    expected = {"bp_vanilla": 2.00, "bp_checkpointing": 2.66, "fmad_vanilla": 2.00, "zo_vanilla": 2}
    found = {n: bench.cost(n, plan.catalog.methods[n], 8, 64) for n in expected}
    assert {n: round(c["forward_units"], 2) for n, c in found.items()} == expected
    assert found["bp_vanilla"]["forward_flops"] == pytest.approx(7.70e12, rel=1e-3)
    beyond = {name: cost["peak_bytes"] for name, cost in found.items()}
    assert beyond["bp_checkpointing"] < beyond["fmad_vanilla"] < beyond["bp_vanilla"]
    assert found["zo_vanilla"]["weights_bytes"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)


def test_four_bit_weights_count_half_a_byte_and_their_scales(plan):
    packed = Bench(plan.catalog.models["opt_1_3b"])
    cost = packed.cost("zo_vanilla", plan.catalog.methods["zo_vanilla"], 2, 16)
    blocks = 24 * (4 * 2048**2 + 2 * 2048 * 8192)
    rest = packed.parameters - blocks
    # the head's frozen original is kept in float32 beside the trained copy
    assert cost["weights_bytes"] == pytest.approx(blocks * (0.5 + 2 / 128) + 2 * rest, rel=1e-3)
    largest_layer = 2048 * 8192
    assert cost["peak_by_category"]["temporary"] >= 2 * largest_layer  # unpacked for its product


@pytest.mark.parametrize("name", ["opt", "llama", "qwen2_vl"])
def test_every_method_runs_on_a_packed_base(plan, name):
    entry = small(name, lora(name, dropout=0.1), layers=2, hidden=32)
    entry = overlaid(entry, {"source.bits": 4, "source.group": 16, "source.dtype": "bfloat16"}, "t")
    bench = Bench(entry)
    for key in ("bp_checkpointing", "fmad_vanilla", "fmad_multiple", "zo_vanilla", "fzoo"):
        cost = bench.cost(key, plan.catalog.methods[key], 4, 32)
        loose = 0.02 if key.startswith("fmad") else 1e-6
        assert cost["theory_units"] == pytest.approx(cost["forward_units"], rel=loose), key


def test_categories_add_up_and_say_what_is_known(plan):
    entry = small("llama", vocabulary=2048, layers=4)
    bench = Bench(entry)
    costs = {n: bench.cost(n, plan.catalog.methods[n], 2, 32) for n in (*METHODS, "fmad_multiple")}
    for cost in costs.values():
        whole = sum(cost["peak_by_category"].values())
        assert whole == cost["peak_bytes"] + cost["state_bytes"] + cost["weights_bytes"]
    logits = 2 * 32 * 2048 * 4
    assert costs["zo_vanilla"]["peak_by_category"]["logits and loss"] >= 2 * logits
    kept = {
        name: cost["peak_by_category"].get("saved activations", 0) for name, cost in costs.items()
    }
    assert kept["bp_checkpointing"] < kept["bp_selective"] < kept["bp_vanilla"]
    assert kept["zo_vanilla"] == kept["fmad_vanilla"] == 0
    tangents = [costs[n]["peak_by_category"] for n in ("fmad_vanilla", "fmad_multiple")]
    assert tangents[1]["directions"] == pytest.approx(8 * tangents[0]["directions"], rel=0.01)
    assert (
        sum(tangents[1].values())
        > 3 * sum(tangents[0].values()) - 4 * costs["zo_vanilla"]["weights_bytes"]
    )


def test_a_meter_within_another_can_stay_unseen():
    with Meter() as outer:
        torch.ones(10)
        with unseen(), Meter() as inner:
            torch.ones(1000)
    assert (outer.peak, inner.peak) == (40, 4000)


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


# --- four bits -------------------------------------------------------------------------------------


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
    objective = build_full_size(source, lora("llama"), adapters_at_zero=False)
    data = sample_batch(transformers_config(source.config), source.form, 2, 8)
    assert any(isinstance(m, QuantisedLinear) for m in objective.module.modules())
    z = torch.randn(3, objective.d)
    _, gradient = objective.gradient(data)
    for count in (1, 3):
        _, slopes = directional_derivatives(objective, data, z[:count])
        torch.testing.assert_close(slopes, z[:count] @ gradient, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama", "qwen2_vl"])
def test_a_chunked_loss_is_the_same_function(family):
    source = family_source(family, hidden=32, heads=2, vocabulary=64)
    data = sample_batch(transformers_config(source.config), source.form, 2, 12)
    found = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        source = source.model_copy(update={"loss_chunk": chunk})
        objective = build_full_size(source, lora(family), adapters_at_zero=False)
        loss, gradient = objective.gradient(data)
        z = torch.ones(2, objective.d)
        slopes = directional_derivatives(objective, data, z)[1]
        found.append(
            (loss, gradient.clone(), slopes, directional_derivatives(objective, data, z[:1])[1])
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_chunked_loss_lowers_every_method_s_peak(plan):
    entry = small("llama", vocabulary=8192, hidden=64)
    chunked = overlaid(entry, {"source.loss_chunk": 16}, "test")
    for name in METHODS:
        whole, part = (
            Bench(e).cost(name, plan.catalog.methods[name], 4, 32)["peak_by_category"]
            for e in (entry, chunked)
        )
        assert part["logits and loss"] < whole["logits and loss"] / 4, name


# --- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bytes_at", "limit", "expected", "calls"),
    [
        (lambda n: 1000 + 37 * n, 5000, 108, 6),
        (lambda n: 1000 + 37 * n, 1037, 1, 3),
        (lambda n: 1000 + 37 * n, 1036, 0, 1),
        (lambda n: 5 + n * n, 10_005, 100, 8),
        (lambda n: 3 * n + n * n / 7, 1e6, 2635, 9),
        (lambda n: max(1000, 10 * n), 5000, 500, 12),
        (lambda n: 10, 20, 4096, 14),
    ],
)
def test_the_largest_that_fits(bytes_at, limit, expected, calls):
    asked = []

    def counted(n):
        asked.append(n)
        return bytes_at(n)

    assert largest(counted, limit, 4096) == expected
    assert len(asked) <= calls
    assert expected == max((n for n in range(1, 4097) if bytes_at(n) <= limit), default=0)


def test_what_fits_is_the_last_that_does(plan):
    bench = Bench(small("llama"))
    search = Fitting(bench, plan.catalog.methods)
    weights = bench.cost("zo_vanilla", plan.catalog.methods["zo_vanilla"], 1, 8)["weights_bytes"]
    limit = weights + 2**20
    for name in ("bp_checkpointing", "zo_vanilla"):
        found = search.fit(name, limit, 2, 16)
        assert (
            search.bytes(name, found["batch"], 16)
            <= limit
            < search.bytes(name, found["batch"] + 1, 16)
        )
        assert (
            search.bytes(name, 2, found["length"])
            <= limit
            < search.bytes(name, 2, found["length"] + 8)
        )
    rows = [search.fit(name, limit, 2, 16, False) for name in ("bp_vanilla", "bp_checkpointing")]
    rows.append(search.fit("zo_vanilla", limit, 2, 16, False))
    assert cheapest_plan(plan, rows, limit)["method"] == "bp_vanilla"
    tight = (search.bytes("bp_checkpointing", 2, 16) + search.bytes("bp_vanilla", 2, 16)) / 2
    assert cheapest_plan(plan, rows, tight)["method"] == "bp_checkpointing"
    assert cheapest_plan(plan, rows, weights) is None


def test_models_are_listed_by_size(plan):
    rows = models_that_fit(
        plan, ["bert_large", "bert_base"], {"zo_vanilla": plan.catalog.methods["zo_vanilla"]}, 2, 8
    )
    assert [row["model"] for row in rows] == ["bert_base", "bert_large"]
    assert rows[0]["bytes"]["zo_vanilla"] > 4 * 109e6


# --- the command line, and mistakes ------------------------------------------------------------------


def test_the_list_of_objects(costbp, workdir):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    (workdir / "mine").mkdir()
    (workdir / "mine/config.json").write_text(
        json.dumps({**config, "intermediate_size": 64, "vocab_size": 64})
    )
    words = ("--batch", "2", "--seq", "8", "--method", "bp_vanilla,zo_vanilla", "--set", "lora.r=3")
    done = costbp("cost", "--model", "mine", *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [entry["method"] for entry in found] == ["bp_vanilla", "zo_vanilla"]
    wanted = "method forward_units flops peak_bytes peak_by_category weights_bytes seconds device"
    assert {*wanted.split(), "model", "batch", "seq"} <= set(found[0])
    assert found[0]["d"] == 2 * 3 * (32 + 32 + 32 + 32)
    (workdir / "mine/config.json").write_text(json.dumps(config))
    done = costbp("cost", "--model", "mine")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "configuration of a 'llama' model: vocab_size missing" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-m", "llama"], "no entry 'llama'; allowed: "),
        (["-m", "bert_base", "--seq", "600"], "length 600 exceeds the model's maximum of 512"),
        (["-m", "bert_base", "--device", "gpu"], "--device gpu: allowed: meta, cpu, cuda"),
        (["-m", "bert_base", "--set", "lora.r"], "wants KEY=VALUE"),
        (["-m", "bert_base", "--set", "train.rr=2"], "unknown key 'train.rr'"),
        (["-m", "bert_base", "--set", "lora.r=0"], "train.rank = 0"),
        (["-m", "bert_base", "--set", "train.targets=[nowhere]"], "match no layer"),
        (["-m", "minilm_lora"], "measured on data: name its --task"),
        (["-m", "qwen2_vl_7b", "--seq", "4"], "too short for an image"),
        (["-m", "bert_base", "-M", "bp_vanila"], "did you mean 'bp_vanilla'"),
    ],
)
def test_mistakes_are_one_line(words, text, workdir, capsys):
    from costbp.cli import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["costbp", "cost", *words])
        main()
    assert end.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("costbp: ") and text in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent():
    with pytest.raises(UserError, match="no CUDA device here; --device meta needs none"):
        Bench(small("bert"), "cuda")


@pytest.mark.parametrize("text", ["24", "many GB", "-3GB", "1.2.3GB"])
def test_a_memory_needs_a_unit(text):
    from costbp.cli.cost import bytes_of

    assert bytes_of("memory", "1.5 GiB") == 3 * 2**29
    with pytest.raises(UserError, match="wants a number with a unit, as 24GB"):
        bytes_of("memory", text)


def test_an_unreadable_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not a readable JSON file"):
        entry_from_config(tmp_path)
    with pytest.raises(UserError, match="'model_type' is missing"):
        transformers_config({})
    with pytest.raises(UserError, match="'lama' is unknown"):
        transformers_config({"model_type": "lama"})


def test_shares_of_the_rule_of_thumb(plan):
    methods = plan.catalog.methods
    assert (
        forward_units(methods["bp_vanilla"]) == 2
        and forward_units(methods["bp_checkpointing"]) == 3
    )
    found = shares(products(family_source("llama", layers=64, hidden=512), lora("llama"), 1, 16))
    assert math.isclose(found.live, 1, abs_tol=0.02)
