"""Plan ``sub_layer``: gradients by halves of blocks and from few kept inputs, what they cost and save;
and plan ``offload``."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from benchmarks.families import FAMILIES
from costbp.config.catalog import BudgetEntry
from costbp.config.load import overlaid
from costbp.config.methods import BackpropSpec
from costbp.config.optimizer import OptimizerSpec
from costbp.config.shares import fewest_inputs
from costbp.config.trainables import FullTraining
from costbp.cost.bench import Bench
from costbp.cost.ceiling import search
from costbp.cost.step import measure_step
from costbp.errors import UserError
from costbp.estimators.backprop import Backprop
from costbp.estimators.memory_plans import (
    PLANS,
    Keeping,
    SubLayers,
    _attention,
    blocks,
    keep_all,
    per_block,
)
from costbp.objective import Key, Objective
from tests.entries import lora, small
from tests.small import Network, class_loss, examples, small_model

KEY = Key(7, 3)
families = pytest.mark.parametrize("family", FAMILIES)


def gradient(plan, objective, data):
    return Backprop(plan).estimate(objective, [data], KEY).gradient.clone()


def by_autograd(objective, data):
    """The gradient by ``torch.autograd.grad``, with the noise of an estimate."""
    parameters = dict(objective.module.named_parameters())
    with objective.noise(KEY):
        loss = objective.value(data)
        wanted = [parameters[name] for name in objective.slices]
        parts = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


# --- exactness -----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.3}, {"train": "full"}, {"attention": "sdpa", "dropout": 0.3}],
    ids=["lora", "full", "fused"],
)
def test_gradients_are_those_of_reverse_mode(family, options):
    objective, data = small_model(family, layers=5, **options)
    wanted = by_autograd(objective, data)
    for inputs in (3, 4, 5, None):
        assert torch.equal(gradient(SubLayers(inputs), objective, data), wanted)
    assert all(not m._forward_hooks for m in objective.module.modules())


def test_gradients_on_a_packed_base():
    packed = {"source.bits": 4, "source.group": 16, "train.dropout": 0.3}
    bench = Bench(overlaid(small("llama", layers=5), packed, "test"), "cpu")
    data = bench.sample(2, 12)
    wanted = by_autograd(bench.objective, data)
    assert torch.equal(gradient(SubLayers(), bench.objective, data), wanted)


COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
WIDE = {"intermediate_size": 64, "attention_dropout": 0.2, "hidden_dropout": 0.2}
OTHERS = {  # what their blocks differ in
    "modernbert": {**COMMON, **WIDE, "global_attn_every_n_layers": 2, "local_attention": 4},
    "gpt_neox": {**COMMON, **WIDE, "use_parallel_residual": True},  # both halves from one input
    "gemma2": {**COMMON, **WIDE, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4},
    "mixtral": {**COMMON, **WIDE, "num_key_value_heads": 2, "num_local_experts": 3},
    "t5": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 5,
        "num_heads": 2,
    },
}


class Called(nn.Module):
    """A transformers model that computes its own loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch).loss


@pytest.mark.parametrize("kind", OTHERS)
def test_blocks_of_other_kinds_are_run_again_as_they_were(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **OTHERS[kind])
    config.pad_token_id = config.decoder_start_token_id = 0
    config.use_cache = False
    makers = {
        "modernbert": transformers.AutoModelForMaskedLM,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }
    model = makers.get(kind, transformers.AutoModelForCausalLM).from_config(config)
    model = model.train().to(torch.float32 if kind == "mixtral" else torch.float64)
    ids = torch.randint(1, 64, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    objective = Objective(Called(model), lambda loss, batch: loss)
    wanted = by_autograd(objective, batch)
    names = {type(_attention(block)).__name__ for block in blocks(objective.module)}
    assert all("Att" in name for name in names) and len(names) == 1
    for inputs in (None, 5, 20):
        assert torch.equal(gradient(SubLayers(inputs), objective, batch), wanted)


class Chain(nn.Module):
    """Blocks of two linear layers, between which the model may write to what they put out."""

    def __init__(self, between=lambda x: x, inside=lambda x: x):
        super().__init__()
        make = lambda: Block(inside)  # noqa: E731
        self.blocks, self.between = nn.ModuleList(make() for _ in range(6)), between

    def forward(self, batch):
        x = batch["features"]
        for block in self.blocks:
            x = self.between(block(x, scale=[torch.tensor(0.5)]))
        return x


class Block(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.first, self.second, self.inside = nn.Linear(4, 4), nn.Linear(4, 4), inside

    def forward(self, x, scale):
        return x + scale[0] * self.second(torch.tanh(self.first(self.inside(x))))


@pytest.mark.parametrize("between", [lambda x: x, lambda x: x * 2, lambda x: x.mul_(2)])
def test_what_a_model_does_between_two_blocks_counts(between):
    torch.manual_seed(0)
    objective, batch = Objective(Chain(between), class_loss), examples(5, dtype=torch.float32)
    wanted = by_autograd(objective, batch)
    assert torch.equal(gradient(SubLayers(3), objective, batch), wanted)


def test_a_block_that_writes_to_its_input_is_refused():
    objective = Objective(Chain(inside=lambda x: x.mul_(2)), class_loss)
    with pytest.raises(RuntimeError, match="changed in place"):
        gradient(SubLayers(3), objective, examples(5, dtype=torch.float32))


def test_a_model_without_blocks_is_run_again_whole():
    objective = Objective(Network(), class_loss)
    batch = examples(5, dtype=torch.float32)
    assert torch.equal(gradient(SubLayers(), objective, batch), by_autograd(objective, batch))


def test_autocast_is_that_of_the_forward_pass():
    class Cast(Chain):
        def forward(self, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(batch)

    torch.manual_seed(0)
    objective, batch = Objective(Cast(), class_loss), examples(5, dtype=torch.float32)
    assert torch.equal(gradient(SubLayers(3), objective, batch), by_autograd(objective, batch))


def test_a_second_backward_pass_through_one_graph():
    objective, batch = small_model("llama", layers=3, dropout=0.3)
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    with SubLayers()(objective, batch):
        loss = objective.value(batch)
        first, second = (torch.autograd.grad(loss, trained, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_too_few_inputs():
    objective, batch = small_model("llama", layers=5)
    with pytest.raises(UserError, match=r"inputs = 2 is too few for 5 blocks; allowed: 3 or more"):
        gradient(SubLayers(2), objective, batch)
    assert [fewest_inputs(n) for n in (1, 2, 3, 4, 6, 7, 10, 11, 32)] == [1, 2, 2, 3, 3, 4, 4, 5, 8]


# --- cost ----------------------------------------------------------------------------------------


def step(bench, plan, batch, length):
    with bench.tracing():
        data = bench.sample(batch, length)
        optimizer = torch.optim.SGD([bench.objective.theta])
        return measure_step(bench.objective, Backprop(plan), optimizer, data)


TARGETS = {  # of the families' linear layers
    "bert": [("query", "value"), ("query", "key", "value")],
    "opt": [("q_proj", "v_proj"), ("fc1", "fc2"), ("out_proj",)],
    "llama": [("q_proj", "v_proj"), ("k_proj", "o_proj"), ("up_proj", "down_proj")],
    "qwen2_vl": [("q_proj", "v_proj")],
}


@pytest.mark.parametrize("inputs", [None, 4, 10])
@pytest.mark.parametrize("family", TARGETS)
def test_units_are_those_of_the_closed_form(family, inputs):
    trains = [lora(family).model_copy(update={"targets": t}) for t in TARGETS[family]]
    trains += [FullTraining(kind="full")] if family != "qwen2_vl" else []
    for train in trains:
        bench = Bench(small(family, train, layers=5))
        for plan in ("sub_layer", "per_block"):
            spec = BackpropSpec(
                kind="backprop", plan=plan, inputs=inputs if plan == "sub_layer" else None
            )
            found = step(bench, spec.build().plan, 3, 32)
            expected = spec.closed_form(bench._shares(bench.sample(3, 32)))
            assert found.forward_units == pytest.approx(expected, rel=1e-6), train


def test_bytes_are_kept_inputs_and_half_a_block():
    """Of a Llama's feed-forward part: input of the norm in float32, three vectors of inner width and as
    many gradients, the gradient of its output. Per-block checkpointing adds the inputs of all blocks
    and what attention saves."""
    tokens, hidden, inner = 8 * 64, 256, 1024
    sizes = {"hidden": hidden, "inner": inner, "layers": 12, "heads": 4}
    bench = Bench(overlaid(small("llama", **sizes), {"source.dtype": "bfloat16"}, "test"))
    half = tokens * 2 * (2 * hidden + 6 * inner + hidden)
    for inputs in (12, 8, 5):
        found = step(bench, SubLayers(inputs), 8, 64)
        assert found.peak_bytes == pytest.approx(half + inputs * tokens * 2 * hidden, rel=0.01)
    whole = step(bench, per_block, 8, 64).peak_bytes
    saved = tokens * (4 * hidden + 2 * (4 + 2 * 2) * hidden)  # a norm; queries to results; adapters
    assert whole - found.peak_bytes > saved + (11 - 5) * tokens * 2 * hidden


def test_a_ceiling_below_per_block_is_met_without_micro_batches():
    bench = Bench(small("llama", layers=12, hidden=64))
    data, rule = bench.sample(1, 64), OptimizerSpec(name="sgd", lr=1e-2)
    need = {plan: step(bench, plan, 1, 64) for plan in (Keeping(0), SubLayers(12), SubLayers(5))}
    bytes_of = [s.weights_bytes + s.state_bytes + s.peak_bytes for s in need.values()]
    assert bytes_of == sorted(bytes_of, reverse=True)
    texts = [
        "halves of 12 blocks recomputed, 12 inputs kept",
        "halves of 12 blocks recomputed, 5 inputs kept",
    ]
    for limit, text in zip(bytes_of[1:], texts, strict=True):
        ceiling = BudgetEntry(label="few", steps=1, peak_memory=f"{(limit + 0.5) / 1024:.6f}KB")
        with bench.tracing():
            found = search(bench.objective, Backprop(keep_all), rule, data, ceiling)
        assert found.fits and found.text.startswith(text)


# --- offloading ----------------------------------------------------------------------------------


def test_offloaded_activations_leave_the_peak_of_a_trace():
    bench = Bench(small("llama", layers=6, hidden=64))
    kept, moved = (step(bench, PLANS[name], 8, 64) for name in ("none", "offload"))
    saved = kept.peak_by_category["saved activations"]
    assert moved.peak_by_category.get("saved activations", 0) < 0.01 * saved
    assert kept.peak_bytes - moved.peak_bytes > 0.7 * saved
    assert moved.flops == kept.flops


def test_a_cpu_has_nowhere_to_offload_to():
    objective, batch = small_model("bert")
    with pytest.raises(
        UserError, match="on the CPU, where activations have nowhere to go"
    ) as caught:
        gradient(PLANS["offload"], objective, batch)
    assert "\n" not in str(caught.value)
