"""What fits into a memory, the commands `cost` and `fit`, and mistakes with them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.families import family_source
from costbp.cli import app
from costbp.config.load import overlaid
from costbp.cost.bench import Bench, entry_from_config
from costbp.cost.fit import Fitting, between, cheapest_plan, largest, models_that_fit
from costbp.cost.pairs import traceable
from costbp.cost.products import products, shares
from costbp.errors import UserError
from costbp.meter import Meter, looping
from costbp.models.architecture import transformers_config
from tests.entries import lora, small


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


FITTED = (
    "bp_vanilla",
    "bp_selective",
    "bp_checkpointing",
    "fmad_multiple",
    "zo_vanilla",
    "zo_svrg",
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_fits_is_the_last_that_does(family, attention, plan):
    bench = Bench(overlaid(small(family), {"source.attention": attention}, "test"))
    methods = {name: plan.catalog.methods[name] for name in FITTED}
    for name, method in methods.items():
        search = Fitting(bench, methods)
        limit = bench.trace(method, 9, 24).bytes + 100
        found = search.fit(name, "1GB", limit, (2, 16))
        most = 6 if name.startswith("fmad") else 3  # as wanted, and two near the answers
        assert len(search._known) <= most, name
        batch, length = found.batch, found.length
        assert bench.trace(method, batch, 16).bytes <= limit, name
        assert bench.trace(method, batch + 1, 16).bytes > limit, name
        assert bench.trace(method, 2, length).bytes <= limit, name
        assert bench.trace(method, 2, length + 8).bytes > limit, name
    cost = bench.cost(name, method, 2, 16)
    assert found.bytes == cost.bytes and math.isclose(found.units, cost.forward_units)


@pytest.mark.parametrize("tokens", [24, 10_000])
def test_what_fits_is_what_trying_all_finds(tokens, plan):
    """Also where the order of storages depends on the length, since logits come in chunks."""
    method = {"bp_checkpointing": plan.catalog.methods["bp_checkpointing"]}
    bench = Bench(overlaid(small("llama"), {"source.loss_chunk": tokens}, "test"))
    limit = bench.trace(method["bp_checkpointing"], 3, 24).bytes
    found = Fitting(bench, method).fit("bp_checkpointing", "1GB", limit, (2, 16))

    def fits(batch, length):
        return bench.trace(method["bp_checkpointing"], batch, length).bytes <= limit

    assert found.batch == max(n for n in range(1, 8) if fits(n, 16)) < 7
    assert found.length == max(8 * n for n in range(1, 9) if fits(2, 8 * n)) < 64


def test_a_curve_is_exact_between_and_beyond(plan):
    """Where no kernel pads: the memory-efficient one keeps a number a row of 32 places."""
    entry = overlaid(small("llama"), {"source.attention": "eager"}, "test")
    bench, method = Bench(entry), plan.catalog.methods["bp_checkpointing"]
    one, other = bench.trace(method, 2, 16), bench.trace(method, 2, 32)
    curve = between(one, 16, other, 32)
    for length in (8, 40, 96):
        assert curve(length) == (bench.trace(method, 2, length).bytes, True)
    another = bench.trace(plan.catalog.methods["bp_vanilla"], 2, 32)
    assert between(one, 16, another, 32) is None


def test_a_loop_is_one_storage_of_a_timeline():
    def run(turns, size):
        with Meter() as meter:
            kept = torch.empty(10)
            with looping():
                for _ in range(turns):
                    first = torch.empty(size)
                    del first
                    second, third = torch.empty(size), torch.empty(1)
                    del second, third
            after = torch.empty(20)
            del after, kept
        return meter.timeline()

    one, many = run(1, 8), run(5, 8)
    assert len(many.sizes) == 17 and one.peak == many.peak == 4 * 30
    assert one.unrolled().sizes.tolist() == many.unrolled().sizes.tolist() == [40, 4 * 9, 80]
    assert many.unrolled().died.tolist() == [2, 1, 2] and many.unrolled().peak == many.peak
    assert run(3, 50).unrolled().peak == run(3, 50).peak == 4 * (10 + 51)


def test_where_a_loop_decides_traces_have_the_last_word(plan):
    """Attention in blocks of queries, here the largest part of a peak."""
    bench = Bench(overlaid(small("bert"), {"source.attention": "sdpa"}, "test"))
    method = plan.catalog.methods["fmad_multiple"]
    one, other = bench.trace(method, 2, 16), bench.trace(method, 2, 72)
    assert not between(one, 16, other, 72)(96)[1]
    search = Fitting(bench, plan.catalog.methods)
    limit = bench.trace(method, 9, 24).bytes + 100
    found = search.fit("fmad_multiple", "1GB", limit, (2, 16))
    known = {shape: trace.bytes for (_, shape), trace in search._known.items()}
    assert known[2, found.length] <= limit < known[2, found.length + 8]


def test_the_cheapest_backpropagation_that_fits(plan):
    bench = Bench(small("llama"))
    names = ("bp_vanilla", "bp_checkpointing", "zo_vanilla")
    search = Fitting(bench, plan.catalog.methods)
    needs = {name: search.trace(name, (2, 16)).bytes for name in names}
    limits = {
        "bp_vanilla": needs["bp_vanilla"],
        "bp_checkpointing": needs["bp_vanilla"] - 1,
        None: needs["bp_checkpointing"] - 1,
    }
    for wanted, limit in limits.items():
        found = [search.fit(name, "1GB", limit, (2, 16), lengths=False) for name in names]
        best = cheapest_plan(plan, found, limit)
        assert (best and best.method) == wanted


def test_models_are_listed_by_size(plan):
    models = {name: plan.catalog.models[name] for name in ("bert_large", "bert_base")}
    methods = {"zo_vanilla": plan.catalog.methods["zo_vanilla"]}
    found = models_that_fit(models, methods, (2, 8))
    assert [needs.model for needs in found] == ["bert_base", "bert_large"]
    assert found[0].bytes["zo_vanilla"] > 4 * 109e6


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
        (["-m", "minilm_lora", "-t", "trec", "--batch", "4"], "--batch would change nothing"),
        (["-m", "bert_base", "-t", "trek"], "did you mean 'trec'"),
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
    from costbp.cli.fit import bytes_of

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


SIZED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": 64}


@pytest.mark.parametrize(
    ("kind", "architecture", "form", "targets"),
    [
        ("bert", "BertModel", "classifier", ("query", "value")),
        ("roberta", "RobertaForMaskedLM", "classifier", ("query", "value")),
        ("bert", "BertLMHeadModel", "causal", ("query", "value")),
        ("modernbert", "ModernBertForMaskedLM", "classifier", ("Wqkv",)),
        ("llama", "LlamaForSequenceClassification", "classifier", ("q_proj", "v_proj")),
        ("llama", "LlamaForCausalLM", "causal", ("q_proj", "v_proj")),
        ("falcon", "FalconForCausalLM", "causal", ("query_key_value",)),
        ("phi3", "Phi3ForCausalLM", "causal", ("qkv_proj",)),
        ("gpt2", "GPT2LMHeadModel", "causal", ("c_attn",)),
    ],
)
def test_a_configuration_decides_on_form_and_adapters(kind, architecture, form, targets, tmp_path):
    values = {"model_type": kind, "architectures": [architecture], "dtype": "float32"}
    values |= GPT2 if kind == "gpt2" else {**SIZED, "intermediate_size": 64}
    values |= {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    entry = entry_from_config(tmp_path)
    assert (entry.source.form, entry.train.targets) == (form, targets)
    bench = Bench(entry)
    adapters = [name for name in bench.objective.slices if "lora_A" in name]
    assert len(adapters) == 2 * len(targets)
    assert {name.split(".lora_A")[0].split(".")[-1] for name in adapters} == set(targets)
    if kind == "gpt2":
        with pytest.raises(UserError, match="length 32 exceeds the model's maximum of 24 tokens"):
            bench.sample(2, 32)


def test_adapters_that_nobody_knows(tmp_path, capsys):
    values = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **SIZED}
    (tmp_path / "config.json").write_text(json.dumps(values))
    targets = entry_from_config(tmp_path).train.targets
    assert {"q_a_proj", "kv_b_proj", "o_proj", "up_proj"} < set(targets)
    assert "they go to q_a_proj, " in capsys.readouterr().err
    with pytest.raises(UserError, match="linear layers are called query, key, value, dense"):
        Bench(small("bert", lora("llama")))


def test_shares_of_the_rule_of_thumb(plan):
    methods = plan.catalog.methods
    assert methods["bp_vanilla"].closed_form() == 2
    assert methods["bp_checkpointing"].closed_form() == 3
    found = shares(products(family_source("llama", layers=64, hidden=512), lora("llama"), 1, 16))
    assert math.isclose(found.live, 1, abs_tol=0.02)


def test_settings_of_a_configuration_s_source_are_kept() -> None:
    """A trace of a configuration's own source loses none of its keys."""
    entry = overlaid(small("llama"), {"source.loss_chunk": 8}, "test")
    found = traceable(entry, Path("assets"))
    assert found is not None
    assert found.source.loss_chunk == 8


def test_a_reserve_that_leaves_nothing() -> None:
    arguments = ["fit", "--memory", "1GB", "--model", "bert_base"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "--memory 1GB: --reserve 1.3GB leaves nothing of it" in str(result.exception)
