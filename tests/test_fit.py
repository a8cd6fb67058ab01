"""What fits into a memory, the commands `cost` and `fit`, and mistakes with them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.families import family_source
from costbp.cost.bench import Bench, entry_from_config
from costbp.cost.fit import Fitting, cheapest_plan, largest, models_that_fit
from costbp.cost.products import products, shares
from costbp.errors import UserError
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


def test_what_fits_is_the_last_that_does(plan):
    bench = Bench(small("llama"))
    search = Fitting(bench, plan.catalog.methods)
    weights = bench.cost("zo_vanilla", plan.catalog.methods["zo_vanilla"], 1, 8).weights_bytes
    limit = weights + 2**20
    shape = (2, 16)

    def bytes_at(name, batch, length):
        return search.cost(name, batch, length).bytes

    for name in ("bp_checkpointing", "zo_vanilla"):
        found = search.fit(name, "1GB", limit, shape)
        assert bytes_at(name, found.batch, 16) <= limit < bytes_at(name, found.batch + 1, 16)
        assert bytes_at(name, 2, found.length) <= limit < bytes_at(name, 2, found.length + 8)
    names = ("bp_vanilla", "bp_checkpointing", "zo_vanilla")
    found = [search.fit(name, "1GB", limit, shape, lengths=False) for name in names]
    assert cheapest_plan(plan, found, limit).method == "bp_vanilla"
    tight = (bytes_at("bp_checkpointing", 2, 16) + bytes_at("bp_vanilla", 2, 16)) / 2
    assert cheapest_plan(plan, found, tight).method == "bp_checkpointing"
    assert cheapest_plan(plan, found, weights) is None


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
    assert methods["bp_vanilla"].closed_form() == 2
    assert methods["bp_checkpointing"].closed_form() == 3
    found = shares(products(family_source("llama", layers=64, hidden=512), lora("llama"), 1, 16))
    assert math.isclose(found.live, 1, abs_tol=0.02)
