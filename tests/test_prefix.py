"""Cached states of frozen blocks, heads of label words, training of chosen blocks: against the whole
model run on tokens; and which parameters a run is scored with."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import BertConfig, BertModel

from costbp.config import Cell, load_plan
from costbp.config.catalog import ModelEntry
from costbp.config.trainables import FullTraining
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.errors import UserError
from costbp.estimators.oracles import positions
from costbp.meter import Meter
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.modules import SHARPNESS
from costbp.models.prefix import states_below
from costbp.objective import Objective
from costbp.tasks import docstrings
from costbp.train.loop import Run
from tests.conftest import working_copy
from tests.small import train_until

CPU = torch.device("cpu")
LORA = {"kind": "lora", "rank": 2, "alpha": 8, "targets": ["query", "value"], "blocks": [-1]}
TRAINED = {
    "adapters": (LORA, "random"),
    "adapters_by_place": ({**LORA, "blocks": [3, -2]}, "random"),
    "label_words": (LORA, "label_words"),
    "block": ({"kind": "full", "blocks": [-1]}, "label_words"),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Each kind of model twice, run whole and with its prefix cached, and a task with few examples."""
    folder = working_copy(tmp_path_factory.mktemp("prefix"))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "PER_CLASS", 30)
        plan = load_plan()
        tiny = plan.catalog.models["tiny_lora"].source
        source = {**tiny.model_dump(), "config": {**tiny.config, "num_hidden_layers": 4}}
        for name, (train, head) in TRAINED.items():
            for prefix in ("run", "cached"):
                entry = {"label": name, "source": source, "train": train, "head": head}
                model = ModelEntry.model_validate({**entry, "prefix": prefix})
                plan.catalog.models[f"{name}_{prefix}"] = model
        small = {"batch_size": 4, "train": 24, "validation": 8, "test": 8, "max_length": 24}
        words = {docstrings.TASK.names[0]: "an array of numbers"}
        task = plan.catalog.tasks["docstrings"].model_copy(update={**small, "label_words": words})
        plan.catalog.tasks["few"] = task
        yield plan


def prepared(plan, model, task="few"):
    return prepare(Pair.of(plan, model, task))


def objective(plan, model):
    """The model in training mode with adapters that do something, and a batch of five."""
    data = load_prepared(prepared(plan, model))
    entry = plan.catalog.models[model]
    module = build_model(entry, len(data.names), Path("none"), 3, data.width, CPU, data.words)
    found = Objective(module, cross_entropy)
    torch.manual_seed(0)
    found.theta.add_(0.1 * torch.randn_like(found.theta))
    return found, data.splits["train"].batch(torch.tensor([0, 5, 9, 11, 20]))


@pytest.mark.parametrize("name", TRAINED)
def test_a_cached_prefix_changes_nothing_but_the_work(plan, name):
    whole, tokens = objective(plan, f"{name}_run")
    rest, states = objective(plan, f"{name}_cached")
    assert whole.d == rest.d
    assert torch.equal(whole.theta, rest.theta)
    assert set(states) == {"inputs_embeds", "attention_mask", "labels"}
    loss, gradient = (t.clone() for t in whole.gradient(tokens))
    cached_loss, cached_gradient = rest.gradient(states)
    assert torch.allclose(loss, cached_loss, rtol=1e-6)
    assert gradient.norm() > 1e-4
    assert torch.allclose(gradient, cached_gradient, atol=1e-6 * float(gradient.norm()), rtol=1e-4)
    kept = 1 if name != "adapters_by_place" else 2
    with torch.no_grad(), Meter() as all_of_it:
        whole.value(tokens)
    with torch.no_grad(), Meter() as left:
        rest.value(states)
    assert left.flops == pytest.approx(all_of_it.flops * kept / 4, rel=0.02)  # plus adapters, head
    held = sum(p.numel() for p in rest.module.parameters())
    assert held < sum(p.numel() for p in whole.module.parameters()) / 2, "embeddings are gone, too"


def test_states_are_those_of_the_whole_model_of_which_no_more_is_run():
    model = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3)).eval()
    batch = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5).long()}
    batch["attention_mask"][1, 3:] = 0
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True).hidden_states[1]
    train = FullTraining(kind="full", blocks=(-2,))
    ran = []
    for block in model.encoder.layer:
        block.register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(states_below(model, train, batch), whole)
    assert len(ran) == 1


def test_label_words_are_cosines_to_the_embeddings_of_the_descriptions(plan):
    found, batch = objective(plan, "label_words_run")
    data = load_prepared(prepared(plan, "label_words_run"))
    assert data.words is not None and data.words.shape == (4, 64)
    other = load_prepared(prepared(plan, "label_words_cached")).words
    assert torch.equal(data.words, other)
    encoder = found.module.encoder
    with torch.no_grad():
        features, center = encoder(batch), data.words.mean(0)
        expected = [
            [float(F.cosine_similarity(f - center, w - center, dim=0)) for w in data.words]
            for f in features
        ]
        logits = found.module(batch)
    assert torch.allclose(logits, SHARPNESS * torch.tensor(expected), atol=1e-5)
    trained = [name for name, p in found.module.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)


def test_of_full_training_by_blocks_the_blocks_are_trained_and_nothing_else(plan):
    found, _ = objective(plan, "block_run")
    names = [name for name, p in found.module.named_parameters() if p.requires_grad]
    assert names and all(".layer.3." in name for name in names)


def test_bad_blocks_heads_and_words_are_refused(plan):
    entry = plan.catalog.models["adapters_run"]
    far = entry.train.model_copy(update={"blocks": (4,)})
    with pytest.raises(UserError, match=r"4 blocks, 0 to 3 or -4 to -1"):
        build_model(entry.model_copy(update={"train": far}), 4, Path("none"), 0, 0)

    def validate(**changes):
        held = plan.catalog.models["adapters_cached"].model_dump()
        return ModelEntry.model_validate(held | changes)

    with pytest.raises(ValidationError, match=r"needs train\.blocks"):
        validate(train={**LORA, "blocks": None})
    with pytest.raises(ValidationError, match="needs 'dropout: 0'"):
        validate(dropout=0.1)
    with pytest.raises(ValidationError, match="nothing is trained"):
        validate(head="label_words", train={"kind": "head"})
    with pytest.raises(ValidationError, match="form encoder"):
        validate(source={**entry.source.model_dump(), "form": "classifier"})
    task = plan.catalog.tasks["few"]
    plan.catalog.tasks["wrong"] = task.model_copy(update={"label_words": {"nonsense": "x"}})
    with pytest.raises(UserError, match="label_words describes 'nonsense'"):
        Pair.of(plan, "adapters_run", "wrong").check()


def scored(plan, keep, curve):
    """A run whose evaluations give the accuracies of ``curve``, and what it is tested with."""
    spec = plan.spec(Cell("adapters_cached", "few", "bp_vanilla", "units_96"), 0)
    settings = {"keep": keep, "points": tuple(i / (len(curve) - 1) for i in range(len(curve)))}
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update=settings)})
    data = load_prepared(prepared(plan, "adapters_cached"))
    module = build_model(spec.model, len(data.names), Path("none"), 0, data.width)
    run, seen, tested = Run(spec, module, data, CPU), [], []
    given = run.scorer

    def score(module, split, scoring):
        found = given(module, split, scoring)
        if split == "test":
            tested.append(run.objective.theta.clone())
            return found
        seen.append((run.state.step, run.objective.theta.clone()))
        found.metrics["accuracy"] = curve[len(seen) - 1]
        return found

    run.scorer = score
    return run, seen, tested


def test_the_test_split_is_scored_with_the_best_evaluation_s_parameters(plan):
    run, seen, tested = scored(plan, "best", [0.1, 0.4, 0.9, 0.9, 0.3])
    run.train(lambda event: None)
    end = run.objective.theta.clone()
    summary = run.summary(test=True)
    losses = [row["validation_loss"] for row in run.state.rows if "validation_loss" in row]
    best = min((2, 3), key=lambda place: losses[place])
    assert summary.scored_step == seen[best][0]
    assert torch.equal(tested[0], seen[best][1])
    assert not torch.equal(tested[0], end)
    assert torch.equal(run.objective.theta, end), "the run itself goes on from where it was"
    assert math.isclose(summary.best_validation_accuracy, 0.9)
    run, seen, tested = scored(plan, "last", [0.1, 0.4, 0.9, 0.3])
    run.train(lambda event: None)
    assert run.summary(test=True).scored_step == run.state.step
    assert torch.equal(tested[0], seen[-1][1])


def test_a_resumed_run_still_knows_its_best_parameters(plan):
    first, _, _ = scored(plan, "best", [0.1, 0.9, 0.2, 0.3])
    train_until(first, lambda state: state.evaluated == 3)
    saved = first.state_dict()
    second, _, tested = scored(plan, "best", [0.1, 0.9, 0.2, 0.3])
    second.load_state_dict(saved)
    second.train(lambda event: None)
    summary = second.summary(test=True)
    assert summary.scored_step == saved["state"]["best"][2]
    assert torch.equal(tested[0], saved["kept"])


def test_batches_of_states_count_as_many_positions_as_tokens(plan):
    _, tokens = objective(plan, "adapters_run")
    _, states = objective(plan, "adapters_cached")
    assert positions(tokens) == positions(states) == tokens["input_ids"].numel()
