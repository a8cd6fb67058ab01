"""The error rate itself as the objective: who can train on it, and that they do."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from costbp.config import Cell, load_plan
from costbp.data.encoded import Split
from costbp.data.prepare import Prepared
from costbp.errors import UserError
from costbp.estimators.probe import COARSE
from costbp.models.build import build_model
from costbp.models.loss import error_rate
from costbp.objective import Objective
from costbp.tasks import docstrings
from costbp.tasks.base import Example
from costbp.train.loop import Run
from tests.conftest import ROOT
from tests.small import examples, network

NAMES = list(docstrings.TASK.names)
WIDTH = 8


def separable(n: int, seed: int) -> Split:
    """Four classes of points around corners that lie apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(NAMES)
    values = 2 * torch.eye(WIDTH)[labels] + 0.6 * torch.randn(n, WIDTH, generator=generator)
    return Split(values, labels, examples=tuple(Example("", NAMES[i]) for i in labels))


DATA = Prepared(
    {name: separable(128, seed) for seed, name in enumerate(("train", "validation", "test"))},
    NAMES,
    {"majority": {"test": 0.25}},
)


def trained(method: str, steps: int, *, data: Prepared = DATA, eps: float | None = None):
    plan = load_plan()
    spec = plan.spec(Cell("tiny_head", "docstrings", method, "units_400"), 0)
    task = spec.task.model_copy(update={"objective": "error_rate", "batch_size": 32})
    entry = spec.method
    if eps is not None:
        oracle = entry.estimator.oracle.model_copy(update={"eps": eps})
        estimator = entry.estimator.model_copy(update={"oracle": oracle})
        entry = entry.model_copy(update={"estimator": estimator})
    budget = spec.budget.model_copy(update={"forward_units": None, "steps": steps})
    optimizer = spec.optimizer.model_copy(update={"name": "sgd", "lr": 0.03})
    update = {"task": task, "method": entry, "budget": budget, "optimizer": optimizer}
    spec = spec.model_copy(update=update)
    module = build_model(spec.model, len(NAMES), ROOT, 0, WIDTH)
    run = Run(spec, module, data, torch.device("cpu"))
    start = run.scorer(run.module, "test").accuracy
    return run, start, run.train(lambda event: None)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_error_rate_is_one_minus_the_accuracy():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.5, 0.4]])
    assert float(error_rate(logits, {"labels": torch.tensor([0, 1, 1, 1])})) == 0.5
    tokens = torch.zeros(1, 3, 4)
    tokens[0, 0, 2] = tokens[0, 1, 3] = 1  # the second and the third token
    assert float(error_rate(tokens, {"labels": torch.tensor([[-100, 2, 1]])})) == 0.5
    assert float(error_rate(tokens, {"labels": torch.tensor([[-100, -100, 3]])})) == 0.0


def test_its_derivative_is_zero():
    objective = Objective(network().module, error_rate)
    slope = torch.func.jvp(
        lambda theta: objective.at(theta, examples()),
        (objective.theta,),
        (torch.ones_like(objective.theta),),
    )[1]
    assert float(slope) == 0


@pytest.mark.parametrize("method", ["zo_vanilla", "zo_multiple", "zo_per_example", "zo_nodes"])
def test_methods_of_differences_raise_the_accuracy(method):
    run, start, (outcome, _) = trained(method, 200)
    assert outcome == "completed"
    assert start < 0.4 and run.scorer(run.module, "test").accuracy > 0.75
    found = [row for row in run.state.rows if "validation_accuracy" in row]
    assert all(
        row["validation_loss"] == pytest.approx(1 - row["validation_accuracy"]) for row in found
    )
    summary = run.summary(test=False)
    assert summary.eps == COARSE and summary.probe_forwards == 0
    assert summary.difference_snr is None and summary.difference_cosine is None


def test_a_step_that_the_entry_names_is_taken():
    run, *_ = trained("zo_vanilla", 2, eps=0.03)
    assert run.summary(test=False).eps == 0.03
    assert run.estimator.difference.step == 0.03


def test_a_run_that_starts_without_an_error_doesn_t_diverge():
    """A start of 0 leaves no room for ten times it; the rate is at most 1 anyway."""
    run, *_ = trained("zo_vanilla", 1)
    run.state.first_loss = run.state.smooth_loss = 0.0
    assert [run._diverged(1.0, 0.0) for _ in range(30)] == [""] * 30
    assert "not finite" in run._diverged(math.nan, 0.0)


@pytest.mark.parametrize("method", ["bp_checkpointing", "fmad_vanilla", "fmad_guess"])
def test_who_differentiates_is_refused_in_one_line(tmp_path, method):
    blocks = [
        {"models": ["minilm_head"], "tasks": ["trec_error"], "methods": ["zo_vanilla", method]},
        {"models": ["minilm_head"], "tasks": ["trec"], "methods": ["bp_checkpointing"]},
    ]
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump({"experiments": [b | {"budgets": ["units_8k"]} for b in blocks]})
    )
    with pytest.raises(UserError) as caught:
        load_plan([path])
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    assert f"'{method}'" in text and "'trec_error'" in text and "error_rate is zero" in text


def test_a_run_s_message_says_where_its_directions_are_plain():
    run, _, ended = trained("lozo", 1)
    assert ended == ("completed", "")  # a head of 4 x 8
    run.estimator.source.rank = 4
    outcome, message = run.train(lambda event: None)
    assert outcome == "completed" and "plain zeroth order" in message and "\n" not in message
