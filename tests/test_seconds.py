"""Bytes that operators move, and the seconds that a card's published peaks make of a step."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from costbp.analysis.costs import table
from costbp.config.cards import BANDWIDTH, CARDS, LAUNCH, RATE, Card, card
from costbp.config.costs import Costs
from costbp.cost.bench import Bench
from costbp.errors import UserError
from costbp.meter import Meter
from tests.entries import small

SLOW = Card(half=1e9, single=1e8, bandwidth=1e9, memory=1, watts=3, source="none")


def work_of(run):
    with Meter() as meter:
        meter.work = {}
        run()
    return meter.work


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda a, b: a @ b.t(), 4 * (6 * 8 + 5 * 8 + 6 * 5)),
        (lambda a, b: a.add(1), 4 * 2 * 48),
        (lambda a, b: a.add_(a), 4 * 3 * 48),
        (lambda a, b: a.copy_(b[:1]), 4 * (48 + 8)),
        (lambda a, b: a.normal_(), 4 * 48),
        (lambda a, b: F.embedding(torch.tensor([1, 3]), a), 2 * 8 + 4 * 2 * 16),
        (lambda a, b: a[:1].expand(4, 8).sum(), 4 * (32 + 1)),
        (lambda a, b: a.bfloat16(), 6 * 48),
    ],
)
def test_bytes_moved(run, moved):
    a, b = torch.randn(6, 8), torch.randn(5, 8)
    work = work_of(lambda: run(a, b))
    assert max(found for _, _, found in work) == moved


def test_views_and_empty_tensors_take_nothing():
    a = torch.randn(6, 8)
    assert work_of(lambda: (a.t(), a.view(-1), a[1:], a.detach(), torch.empty(9))) == {}


def test_a_linear_layer_in_closed_form():
    m, k, n = 64, 32, 16
    layer, x = nn.Linear(k, n, bias=False), torch.randn(m, k)
    flops, moved = 2 * m * k * n, 4 * (m * k + k * n + m * n)
    work = work_of(lambda: layer(x))
    assert work == {(False, flops, moved): 1}
    assert SLOW.seconds(work) == pytest.approx(flops / (RATE * 1e8) + LAUNCH)
    half = layer.bfloat16(), x.bfloat16()
    work = work_of(lambda: half[0](half[1]))
    assert work == {(True, flops, moved / 2): 1}
    assert SLOW.seconds(work) == pytest.approx(
        max(flops / (RATE * 1e9), moved / 2 / (BANDWIDTH * 1e9)) + LAUNCH
    )
    wide = Card(1e15, 1e15, 1e9, 1, 1, "none")  # bytes decide
    assert wide.seconds(work) == pytest.approx(moved / 2 / (BANDWIDTH * 1e9) + LAUNCH)


def test_a_stack_in_closed_form():
    """Three products a layer, two in the first, which passes no gradient on; operators add up."""
    m, n, layers = 32, 16, 5
    stack = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(layers)))
    x = torch.randn(m, n)
    work = work_of(lambda: stack(x).sum().backward())
    products = {key: count for key, count in work.items() if key[1]}
    assert sum(products.values()) == 3 * layers - 1
    rest = {key: count for key, count in work.items() if not key[1]}
    each = 2 * m * n * n / (RATE * 1e8) + LAUNCH
    assert SLOW.seconds(products) == pytest.approx((3 * layers - 1) * each)
    assert SLOW.seconds(work) == pytest.approx(SLOW.seconds(products) + SLOW.seconds(rest))


def test_a_step_of_an_optimiser_is_a_sweep():
    theta = nn.Parameter(torch.randn(1000))
    theta.grad = torch.randn(1000)
    optimizer = torch.optim.SGD([theta], lr=0.1, foreach=False)
    assert work_of(optimizer.step) == {(False, 0, 4 * 3 * 1000): 1}


def test_a_record_has_seconds_and_energy(plan):
    methods, bench = plan.catalog.methods, Bench(small("llama"))
    found = {m: bench.cost(m, methods[m], 2, 16) for m in ("bp_vanilla", "bp_checkpointing")}
    for record in found.values():
        assert set(record.seconds_by_card) == set(CARDS)
        on = record.on("h100")
        assert (
            on.joules == on.card_seconds * 700 and on.card_seconds == record.seconds_by_card["h100"]
        )
    times = [record.seconds_by_card["iphone15"] for record in found.values()]
    assert times[0] < times[1]
    twice = bench.cost("zo_accumulate", methods["zo_accumulate"], 2, 16)
    once = bench.cost("zo_vanilla", methods["zo_vanilla"], 2, 16)
    ratio = twice.seconds_by_card["h100"] / once.seconds_by_card["h100"]
    assert math.isclose(ratio, twice.flops / once.flops, rel_tol=0.15)


def test_the_table_of_costs_shows_a_card_if_asked(plan):
    record = Bench(small("llama"), name="bert_base").cost(
        "zo_vanilla", plan.catalog.methods["zo_vanilla"], 2, 16
    )
    frame = pd.DataFrame([{**record.model_dump(), "bytes": record.bytes, "beyond": record.beyond}])
    for name in (None, "4090"):
        costs = Costs(models=("bert_base",), methods=("zo_vanilla",), card=name)
        asked = plan.model_copy(update={"study": plan.study.model_copy(update={"costs": costs})})
        found = table(asked, frame)
        assert ("Joules" in found) == (name is not None)
    on = record.on("4090")
    assert found["Seconds on 4090"].tolist() == [f"{on.card_seconds:.3g}"]
    assert found["Joules"].tolist() == [f"{on.joules:.3g}"]


def test_an_unknown_card_names_the_known(costbp):
    with pytest.raises(UserError, match=r"card 'h10' is unknown; allowed: a100, .* mean 'h100'"):
        card("h10")
    with pytest.raises(ValueError, match=r"allowed: a100, .*"):
        Costs(models=("a",), methods=("b",), card="h10")
    for words in (["cost"], ["fit"]):
        done = costbp(*words, "--model", "bert_base", "--card", "h10")
        assert done.returncode == 2 and "card 'h10' is unknown" in done.stderr
        assert "Traceback" not in done.stderr
    done = costbp("fit", "--model", "bert_base", "--method", "zo_vanilla", "--no-lengths")
    assert (
        done.returncode == 2 and "name the card's --memory, as 24GB, or its --card" in done.stderr
    )


def test_a_card_has_its_memory(costbp):
    words = ("--model", "bert_base", "--method", "zo_vanilla", "--no-lengths", "--json")
    done = costbp("fit", "--card", "v100", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["memory"] == "16GB"
