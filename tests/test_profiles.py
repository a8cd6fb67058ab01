"""Other people's training loops: what they keep is counted against sums made by hand."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from costbp.cli import app
from costbp.config.catalog import Catalog, ModelEntry
from costbp.config.load import load_catalog
from costbp.config.profiles import FourBit, Profile
from costbp.cost.bench import Bench
from costbp.cost.loops import EightBit, Loop
from costbp.cost.record import CostRecord
from costbp.errors import UserError
from costbp.estimators.memory_plans import keep_all
from costbp.meter import Meter
from costbp.models.loss import cross_entropy, parted_cross_entropy, shifted_cross_entropy
from costbp.objective import Objective
from tests.entries import lora

H, LAYERS, V, INNER, BATCH, LENGTH = 64, 3, 512, 128, 2, 16
CONFIG = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
BLOCK = 4 * H * H + 3 * H * INNER  # weights of a block's linear layers


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog(Path("config/catalog"))


def entry(
    kind: str = "lora", bits: int | None = None, dtype: str = "bfloat16", **config: int
) -> ModelEntry:
    source = {"kind": "config", "form": "causal", "dtype": dtype, "bits": bits}
    source["config"] = CONFIG | config
    train = lora("llama").model_dump() if kind == "lora" else {"kind": "full"}
    given = {"label": "small", "source": source, "train": train}
    return ModelEntry.model_validate(given)


def traced(
    catalog: Catalog, profile: Profile, model: ModelEntry | None = None, method: str = "bp_vanilla"
) -> CostRecord:
    bench = Bench(model or entry(), profile=profile)
    return bench.cost(method, catalog.methods[method], BATCH, LENGTH)


def plain(**settings: object) -> Profile:
    return Profile.model_validate({"label": "test", **settings})


def test_adapters_in_the_base_s_dtype_take_half(catalog: Catalog) -> None:
    wide, narrow = (traced(catalog, plain(adapters=a)) for a in ("float32", "base"))
    assert wide.peak_by_category["adapters"] == 4 * wide.d
    assert narrow.peak_by_category["adapters"] == 2 * narrow.d
    assert narrow.peak_by_category["optimiser state"] < wide.peak_by_category["optimiser state"]


def test_an_untied_head_is_a_second_embedding(catalog: Catalog) -> None:
    tied, untied = (traced(catalog, plain(ties=ties)) for ties in (True, False))
    assert untied.weights_bytes - tied.weights_bytes == 2 * V * H


def test_adamw_keeps_two_moments_and_foreach_copies_all(catalog: Catalog) -> None:
    """At full training of a batch this small the peak is the optimiser's: AdamW of all tensors at once
    holds the square root of all second moments."""
    model = entry("full", dtype="float32")
    alone, at_once = (traced(catalog, plain(foreach=f), model) for f in (False, True))
    size = 4 * alone.d
    for found in (alone, at_once):
        moments = found.peak_by_category["optimiser state"]
        assert 2 * size <= moments < 2.001 * size + 1000  # and the steps
        assert found.peak_by_category["gradients"] == size
    embedding = 4 * V * H
    assert size <= at_once.peak_by_category["temporary"] < 1.1 * size
    assert alone.peak_by_category["temporary"] < 3 * embedding < size


def test_eight_bit_moments_take_a_byte_and_their_scales() -> None:
    large, small = (torch.nn.Parameter(torch.zeros(n)) for n in (8192, 100))
    for paged, wanted in ((False, 2 * (8192 + 4 * 8192 // 256) + 2 * 400), (True, 0)):
        optimizer = EightBit([large, small], paged)
        for parameter in (large, small):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [t for s in optimizer.state.values() for t in s.values()]
        assert sum(t.nbytes for t in state) == wanted


def test_in_backward_no_two_gradients_of_large_tensors_live(catalog: Catalog) -> None:
    model = entry("full", dtype="float32")
    after, during = (
        traced(catalog, plain(optimizer=o), model) for o in ("adamw", "adamw_in_backward")
    )
    assert after.peak_by_category["gradients"] == 4 * after.d
    assert during.peak_by_category.get("gradients", 0) <= 4 * V * H
    assert during.bytes < after.bytes


def test_zeroed_gradients_stay(catalog: Catalog) -> None:
    """Where the peak is at the end of the forward pass, gradients are there only if they stay."""
    model, method = entry("full", dtype="float32"), catalog.methods["bp_vanilla"]
    made, zeroed = (
        Bench(model, profile=plain(gradients=g)).cost("bp_vanilla", method, 8, 64)
        for g in ("made", "zeroed")
    )
    assert zeroed.peak_by_category["gradients"] == 4 * zeroed.d
    assert made.peak_by_category.get("gradients", 0) < 2 * made.d


def test_what_the_loop_holds(catalog: Catalog) -> None:
    logits = 4 * BATCH * LENGTH * V
    chunk = {"chunk": 8}
    nothing, held = (traced(catalog, plain(keeps=k, **chunk)) for k in ("nothing", "logits"))
    assert held.peak_bytes - nothing.peak_bytes >= 0
    assert held.peak_by_category["logits and loss"] >= 2 * logits  # logits, and their log-softmax


def test_inputs_that_layers_keep_go_with_their_graph(catalog: Catalog) -> None:
    """A loss that is still bound in the next step's forward pass holds them once more."""
    few, profile = entry(bits=4, vocab_size=16), {"four_bit": {"keeps_inputs": True}}
    methods, shape = catalog.methods["bp_vanilla"], (8, 64)
    without, once, twice = (
        Bench(few, profile=plain(**settings)).cost("bp_vanilla", methods, *shape).peak_bytes
        for settings in ({}, profile, {**profile, "keeps": "graph"})
    )
    hidden = 2 * shape[0] * shape[1] * H
    kept = LAYERS * (2 * hidden + hidden * INNER // H)  # both norms' results, and the inner width
    assert once - without == pytest.approx(kept, rel=0.1)
    assert twice - once == pytest.approx(kept, rel=0.4)


def test_all_forms_of_the_loss_are_the_same() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 11, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 11))
    labels[0, 5:] = -100
    batch = {"labels": labels}
    whole = cross_entropy(logits, batch)
    for parts in (list(logits.split(4, 1)), iter(logits.chunk(3, 1))):
        torch.testing.assert_close(parted_cross_entropy(parts, batch), whole)
    torch.testing.assert_close(shifted_cross_entropy(logits, batch), whole)


@pytest.mark.parametrize(
    ("double", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / 64 / 256)]
)
def test_four_bit_layers_take_what_their_paper_says(
    catalog: Catalog, double: bool, bits: float
) -> None:
    four = FourBit(double=double)
    found = traced(catalog, plain(four_bit=four), entry(bits=4))
    rest = 2 * (V * H + (2 * LAYERS + 1) * H)  # embedding and norms
    rotary = found.weights_bytes - rest - LAYERS * BLOCK * bits / 8
    assert 0 <= rotary < 1000


def test_unpacking_into_another_dtype_makes_two_copies(catalog: Catalog) -> None:
    """With a batch this small the peak is the largest weight's."""
    small, method = entry(bits=4, vocab_size=16), catalog.methods["bp_vanilla"]
    once, twice = (
        Bench(small, profile=plain(four_bit={"unpacked": u})).cost("bp_vanilla", method, 1, 2)
        for u in ("base", "float16")
    )
    assert twice.peak_bytes - once.peak_bytes == pytest.approx(2 * H * INNER, rel=0.02)


def test_repeated_keys_and_values_are_saved_for_every_head(catalog: Catalog) -> None:
    few, method = entry(num_key_value_heads=1, vocab_size=16), catalog.methods["bp_vanilla"]
    shared, repeated = (
        Bench(few, profile=plain(repeats=r, padding=False)).cost("bp_vanilla", method, 8, 64)
        for r in (False, True)
    )
    apart = repeated.peak_bytes - shared.peak_bytes
    assert apart == LAYERS * 2 * (2 * 8 * 64 * (H - H // 4))  # of keys and of values, in two bytes


def test_mixed_precision_copies_every_weight_once(catalog: Catalog) -> None:
    """Under autocast the graph holds a half-precision copy of each weight of a product, and float32
    masters, gradients and moments are as without it."""
    model = entry("full", dtype="float32")
    seen = {}
    for dtype in (None, "float16"):
        bench = Bench(model, profile=plain(autocast=dtype, optimizer="sgd"))
        found = bench.cost("bp_vanilla", catalog.methods["bp_vanilla"], 8, 64)
        seen[dtype] = found.peak_by_category
    copies = 2 * (LAYERS * BLOCK + V * H)
    saved = seen["float16"]["saved activations"]
    assert copies < saved < copies + seen[None]["saved activations"]


def test_copies_for_mixed_precision_live_through_the_forward_pass(catalog: Catalog) -> None:
    """Also of weights whose blocks are computed again: `torch.autocast` keeps its copies until it ends."""
    model, method = entry("full", dtype="float32"), catalog.methods["bp_checkpointing"]
    peaks = {
        dtype: Bench(model, profile=plain(autocast=dtype, optimizer="sgd", gradients="zeroed"))
        .cost("bp_checkpointing", method, 1, 32)
        .peak_bytes
        for dtype in (None, "float16")
    }
    assert peaks["float16"] - peaks[None] > 2 * LAYERS * BLOCK * 0.6


def test_a_block_more_is_recomputed(catalog: Catalog) -> None:
    kept, all_of_them = (
        traced(catalog, plain(last_block=b), method="bp_checkpointing")
        for b in ("kept", "recomputed")
    )
    assert kept.forward_units < all_of_them.forward_units


def test_the_loop_computes_what_a_plain_loop_does() -> None:
    """The loop runs for real: on the CPU its steps are torch's."""

    def made() -> Objective:
        torch.manual_seed(0)
        module = torch.nn.Linear(5, 3)
        wrapped = torch.nn.ModuleDict({"inner": module})
        wrapped.forward = lambda batch: module(batch["x"])  # type: ignore[method-assign]
        loss = torch.nn.functional.cross_entropy
        return Objective(wrapped, lambda output, batch: loss(output, batch["labels"]))

    batch = {"x": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    theirs = made()
    optimizer = torch.optim.AdamW(theirs.module.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        theirs.loss(theirs.module(batch), batch).backward()
        optimizer.step()
    for name in ("adamw", "adamw_in_backward"):
        ours = made()
        loop = Loop(ours, keep_all, plain(), name)
        with Meter(ours.existing()) as meter:
            loop.run([batch], 3, meter)
        torch.testing.assert_close(ours.theta, theirs.theta, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("profile", "method", "words"),
    [
        ("hf_trainer", "zo_vanilla", "is a loop of bp methods"),
        ("mezo", "bp_vanilla", "is a loop of zo methods"),
    ],
)
def test_a_profile_has_no_loop_for_other_methods(
    catalog: Catalog, profile: str, method: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        traced(catalog, catalog.profiles[profile], method=method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loop": "ours", "foreach": True}, "foreach: loop 'ours' has no such setting"),
        ({"loop": "in_place", "keeps": "graph"}, "keeps: loop 'in_place' has no such"),
        ({"chunk": 8, "chunks": 8}, "one of 'chunk' and 'chunks'"),
    ],
)
def test_settings_that_would_do_nothing(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plain(**settings)


def test_classifiers_have_no_parts_of_logits(catalog: Catalog) -> None:
    model = entry()
    source = model.source.model_copy(update={"form": "classifier"})
    with pytest.raises(UserError, match="a classifier has none"):
        traced(catalog, plain(chunk=8), model.model_copy(update={"source": source}))


def test_mezo_moves_each_parameter_by_copies(catalog: Catalog) -> None:
    """Perturbing holds the noise, it scaled, it times epsilon: three tensors of the largest parameter's
    size; the update four."""
    bench = Bench(entry("full"), profile=catalog.profiles["mezo"])
    method = catalog.methods["zo_vanilla"]
    for part, copies in (("perturb", 3), ("update", 4)):
        found = bench.cost("zo_vanilla", method, 1, 8, part=part)  # type: ignore[arg-type]
        assert found.peak_bytes == copies * 2 * V * H


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "hf_trainr"], "no entry 'hf_trainr'; allowed: costbp, hf_trainer"),
        (["--set", "profile.foreach=true"], "names no --profile that it is a setting of"),
        (
            ["--profile", "litgpt", "--set", "profile.optimizer=lion"],
            "optimizer = 'lion' is not known",
        ),
        (["--profile", "litgpt", "--device", "cpu"], "--profile is traced without weights"),
        (
            ["--profile", "litgpt", "--set", "source.loss_chunk=8"],
            "source.loss_chunk is of this package",
        ),
        (["--profile", "litgpt", "--seq", "999999"], "exceeds the model's maximum of"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    command = ["cost", "--model", "llama_3_1_8b", "--method", "bp_vanilla", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0
    assert words in str(result.exception)
