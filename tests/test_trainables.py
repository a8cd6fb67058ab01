"""What is trained: peft's adapters, virtual tokens and norms, against formulas and references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from benchmarks.families import family_batch, family_source
from costbp.config.catalog import ModelEntry
from costbp.config.load import overlaid
from costbp.config.trainables import LoraTraining, NormTraining, VirtualTokens
from costbp.cost.bench import Bench
from costbp.errors import UserError
from costbp.estimators.forward_mode import directional_derivatives
from costbp.estimators.memory_plans import PLANS
from costbp.models.build import build_from_config
from costbp.models.trainable import trainable
from tests.entries import lora, small

HIDDEN, LAYERS, KEYS, VOCABULARY, RANK = 32, 3, 16, 64, 2
SIZES = {"hidden": HIDDEN, "layers": LAYERS, "heads": 2, "vocabulary": VOCABULARY}
KINDS = {
    "dora": lora("llama", dora=True),
    "beside": lora("llama", beside=("embed_tokens", "lm_head")),
    "prefix": VirtualTokens(kind="prefix", tokens=5),
    "prompt": VirtualTokens(kind="prompt", tokens=7),
    "norms": NormTraining(kind="norms"),
}
ADAPTERS = LAYERS * RANK * ((HIDDEN + HIDDEN) + (HIDDEN + KEYS))  # of queries and values
SIZE = {
    "dora": ADAPTERS + LAYERS * (HIDDEN + KEYS),  # a length for each row of the weights
    "beside": ADAPTERS + 2 * VOCABULARY * HIDDEN,
    "prefix": 5 * LAYERS * 2 * KEYS,
    "prompt": 7 * HIDDEN,
    "norms": (2 * LAYERS + 1) * HIDDEN,
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def objective(kind, family="llama", **update):
    torch.manual_seed(0)
    source = family_source(family, **SIZES).model_copy(update=update)
    return build_from_config(source, KINDS[kind], adapters_at_zero=False)


def batch(length=12):
    return family_batch("llama", 2, length, VOCABULARY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_trained_parameter_counts_and_has_a_gradient(kind, dtype):
    made = objective(kind, dtype=dtype)
    assert made.d == SIZE[kind] and made.theta.dtype == torch.float32
    gradient = made.gradient(batch())[1]
    for name, (start, stop, _) in made.slices.items():
        assert gradient[start:stop].abs().max() > 0, name


def test_three_ways_to_a_derivative_agree(kind):
    made = objective(kind)
    data, v = batch(), torch.randn(2, made.d, generator=torch.Generator().manual_seed(1))
    expected = v @ made.gradient(data)[1]
    assert directional_derivatives(made, data, v)[1].allclose(expected, rtol=1e-3, atol=1e-5)
    alone = directional_derivatives(made, data, v[:1])[1]
    assert alone.allclose(expected[:1], rtol=1e-3, atol=1e-5)
    if kind == "dora":  # differences see the norms that its backward pass holds constant
        return
    eps = 3e-3
    with torch.no_grad():
        losses = [made.at(made.theta + sign * eps * v[0], data) for sign in (1, -1)]
    difference = (losses[0] - losses[1]) / (2 * eps)
    assert difference == pytest.approx(float(expected[0]), rel=0.03, abs=2e-3)


def test_dora_is_that_of_its_paper():
    """Output, gradient with norms held constant (Liu et al. 2024, equations 5 and 11), and the
    whole derivative along a direction, which differences see."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5))
    weight, bias = plain[0].weight.detach().double(), plain[0].bias.detach().double()
    train = LoraTraining(kind="lora", rank=2, alpha=3, targets=("0",), dora=True)
    made = trainable(plain, "encoder", train, adapters_at_zero=False)
    x, wanted = torch.randn(4, 7), torch.randn(4, 5)
    trained = {
        n.split(".lora_")[1].split(".")[0]: p for n, p in made.named_parameters() if p.requires_grad
    }
    lengths = trained["magnitude_vector"]
    lengths.data += 0.1

    def reference(a, b, m, hold):
        whole = weight + 1.5 * b @ a
        norm = whole.norm(dim=1)
        norm = norm.detach() if hold else norm
        return F.mse_loss(x.double() @ ((m / norm)[:, None] * whole).T + bias, wanted.double())

    names = ("A", "B", "magnitude_vector")
    values = [trained[name].detach().double().requires_grad_() for name in names]
    loss = F.mse_loss(made(x), wanted)
    assert loss.item() == pytest.approx(reference(*values, False).item(), rel=1e-5)
    loss.backward()
    expected = torch.autograd.grad(reference(*values, True), values)
    for name, gradient in zip(names, expected, strict=True):
        assert trained[name].grad.allclose(gradient.float(), rtol=1e-4, atol=1e-6), name
    made.double()
    b, step = trained["B"], torch.randn(5, 2).double()
    losses = []
    for sign in (1, -1):
        b.data = values[1].detach() + sign * 1e-5 * step
        losses.append(F.mse_loss(made(x.double()), wanted.double()).item())
    slope = (losses[0] - losses[1]) / 2e-5
    whole = torch.autograd.grad(reference(*values, False), values)[1]
    assert slope == pytest.approx(float((whole * step).sum()), rel=1e-6)
    assert slope != pytest.approx(float((expected[1] * step).sum()), rel=0.01)


def test_a_trace_counts_what_runs_and_what_closed_forms_say(plan, kind):
    entry = small("llama", KINDS[kind], layers=5)
    traced, real = Bench(entry), Bench(entry, "cpu")
    for name in ("bp_vanilla", "bp_checkpointing", "fmad_multiple", "zo_vanilla"):
        method = plan.catalog.methods[name]
        one, other = (bench.cost(name, method, 2, 32, timed=False) for bench in (traced, real))
        assert (one.flops, one.d, one.state_bytes) == (other.flops, other.d, other.state_bytes)
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=4e-3)
        if kind != "dora":  # a rule of thumb
            loose = 0.005 if name.startswith("fmad") else 1e-6
            assert one.closed_form == pytest.approx(one.forward_units, rel=loose), name


def test_norms_of_an_image_tower_are_trained_too(plan):
    bench = Bench(small("qwen2_vl", KINDS["norms"], layers=4))
    for name in ("bp_vanilla", "bp_checkpointing"):
        cost = bench.cost(name, plan.catalog.methods[name], 2, 32)
        assert cost.closed_form == pytest.approx(cost.forward_units, rel=1e-6)


@pytest.mark.parametrize("plan", ["per_block", "selective"])
def test_what_is_computed_again_gives_the_same_gradient(kind, plan):
    made, data = objective(kind), batch()
    expected = made.gradient(data)[1].clone()
    with PLANS[plan](made, data):
        assert made.gradient(data)[1].equal(expected)


# --- virtual tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_are_those_of_peft(family, kind):
    """Without padding the logits are peft's, less those of the tokens' own places."""
    made = objective(kind, family)
    data = {name: rows[1:] for name, rows in batch().items()}
    module = made.module
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = module.model.model(**inputs).logits[:, -12:]
        found = module(data)
        assert found.shape == (1, 12, VOCABULARY) and found.allclose(expected, atol=1e-5)
        text = F.cross_entropy(found[0, :-1], data["labels"][0, 1:])
        assert made.value(data).allclose(text)
        unmasked = {name: data[name] for name in ("input_ids", "labels")}
        assert module(unmasked).allclose(found, atol=1e-5)
        made.theta.neg_()
        assert not module(data).allclose(found, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_text_is_scored_and_written_the_same_with_padding_on_its_left(family, kind):
    model = objective(kind, family).module.model.eval()
    ids = torch.randint(10, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = F.pad(ids, (4, 0), value=1)
    mask = F.pad(torch.ones_like(ids), (4, 0))
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert model(input_ids=padded, attention_mask=mask, logits_to_keep=9).logits.allclose(
            alone, atol=1e-5
        )
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
        )
        written = model.generate(padded, mask, generation_config=settings)
        assert written[:, :13].equal(padded) and written.shape == (1, 17)
        logits = model(input_ids=written, attention_mask=F.pad(mask, (0, 4), value=1)).logits
        chosen = logits[:, 12:-1].gather(2, written[:, 13:, None])[..., 0]
        assert chosen.allclose(logits[:, 12:-1].amax(-1), atol=1e-4)


def test_a_profile_of_a_trainer_takes_them(plan, kind):
    train = KINDS[kind] if kind != "beside" else lora("opt", beside=("lm_head",))
    entry = small("opt", train)
    entry = overlaid(entry, {"source.dtype": "bfloat16"}, "test")
    profiles, method = plan.catalog.profiles, plan.catalog.methods["bp_vanilla"]
    bench = Bench(entry, profile=profiles["hf_trainer_2022"])
    assert bench.cost("x", method, 1, 32).reserved
    if kind in ("prefix", "prompt"):
        with pytest.raises(UserError, match="makes logits in parts, without the tokens of"):
            Bench(entry, profile=profiles["litgpt"])
        return
    bench = Bench(entry, profile=profiles["litgpt"])
    assert bench.objective.theta.dtype == torch.bfloat16
    assert bench.cost("x", method, 1, 32).allocated


# --- mistakes --------------------------------------------------------------------------------------


def test_entries_without_new_keys_are_named_as_before():
    assert set(lora("llama").model_dump()) == {
        "kind",
        "rank",
        "alpha",
        "dropout",
        "targets",
        "blocks",
    }


@pytest.mark.parametrize(
    ("family", "train", "source", "message"),
    [
        ("bert", KINDS["prefix"], {}, "serves models of form causal, not classifier"),
        ("qwen2_vl", KINDS["prompt"], {}, "serves models of form causal, not image_text"),
        ("llama", KINDS["prefix"], {"loss_chunk": 8}, "can't have source.loss_chunk"),
        ("llama", KINDS["dora"], {"bits": 4}, "train.dora reads whole weights"),
    ],
)
def test_what_a_model_cannot_have_is_refused(family, train, source, message):
    source = family_source(family).model_copy(update=source)
    with pytest.raises(ValidationError, match=message):
        ModelEntry(label=family, source=source, train=train)


def test_names_and_lengths_that_a_model_has_not_are_one_line(plan):
    with pytest.raises(UserError, match=r"train\.beside: LlamaForCausalLM has no module 'nowhere'"):
        Bench(small("llama", lora("llama", beside=("nowhere",))))
    bench = Bench(small("opt", KINDS["prefix"]))
    with pytest.raises(UserError, match=r"length 596 exceeds the 595 positions that train\.tokens"):
        bench.cost("x", plan.catalog.methods["zo_vanilla"], 1, 596)
    falcon = {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    source = family_source("llama").model_copy(update={"config": {**falcon, **sizes}})
    bench = Bench(ModelEntry(label="falcon", source=source, train=KINDS["prefix"]))
    with pytest.raises(UserError, match=r"train\.kind = prefix: the model's keys have 1 heads"):
        bench.cost("x", plan.catalog.methods["zo_vanilla"], 1, 8)
