"""Where theta is large nothing of its length is made: draws, forwards, tangents and the step by piece."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import nn

import costbp
from costbp import objective as ground
from costbp.config.catalog import ModelEntry
from costbp.config.load import overlaid
from costbp.config.trainables import FullTraining
from costbp.cost.bench import Bench
from costbp.cost.step import CostCounter, forward_only
from costbp.estimators import update as updates
from costbp.estimators.backprop import Backprop
from costbp.estimators.directions import (
    Coordinate,
    Gaussian,
    LowRank,
    Orthogonal,
    Rademacher,
    Sparse,
    Sphere,
    pieces,
)
from costbp.estimators.memory_plans import PLANS
from costbp.estimators.oracles import Central, Exact, OneSided
from costbp.estimators.projected import Projected
from costbp.estimators.update import decide, update
from costbp.estimators.variance import Accumulate
from costbp.meter import Meter
from costbp.objective import Key, Objective
from tests.conftest import Lift64
from tests.entries import small
from tests.small import linear_objective, reference, small_model

KEY = Key(7, 3)
SGD = functools.partial(torch.optim.SGD, lr=0.01)


@pytest.fixture
def pieced(monkeypatch):
    """Parameters of more than 100 numbers are large, and so is every theta below."""
    monkeypatch.setattr(ground, "PIECE", 100)
    monkeypatch.setattr(updates, "PIECE", 100)
    monkeypatch.setattr(ground, "SHARE", 2**20)


# --- draws -----------------------------------------------------------------------------------------


def test_pieces_are_whole_rows_that_tile_theta(pieced):
    objective = linear_objective((31, 8), (7,), (250,), (2, 130), (3, 4, 30), ())
    ends = [0]
    for piece in pieces(objective):
        assert piece.entries.start == ends[-1]
        ends.append(piece.entries.stop)
    assert ends[-1] == objective.d
    rows = {name: [p.rows.stop for p in own] for name, own in objective.pieces.items()}
    assert [*rows.values()] == [[12, 24, 31], [7], [100, 200, 250], [1, 2], [1, 2, 3], [1]]


SOURCES = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "orthogonal": Orthogonal(),
    "coordinate": Coordinate(),
    "low_rank": LowRank(2),
    "sparse": Sparse(0.2, 5),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pieces_come_again_in_any_order(pieced, name):
    objective, source = linear_objective((31, 8), (9,), (20, 12)), SOURCES[name]
    source.update(objective, KEY, lambda directions: None)
    directions = source.draw(objective, KEY, 3)
    dense = source.draw(objective, KEY, 3).dense
    asked = [(k, piece) for k in range(3) for piece in pieces(objective)]
    random.Random(0).shuffle(asked)
    for k, piece in asked:
        assert torch.equal(directions.part(k, piece), dense[k, piece.entries]), (k, piece)
        assert directions.part(k, piece).shape == (piece.size,)


def test_what_is_small_is_drawn_as_ever_and_pieces_are_independent(pieced):
    objective = linear_objective((5, 4), (40, 50))
    directions = Gaussian().draw(objective, KEY, 2)
    (whole,), large = objective.pieces["parts.0"], objective.pieces["parts.1"]
    plain = torch.randn(20, generator=KEY.at(1).at(0).generator())
    assert torch.equal(directions.part(1, whole), plain.double())
    rows = torch.stack([directions.part(0, piece) for piece in large])
    assert len(rows) == 20 and len(rows.unique()) == rows.numel()


def test_large_matrices_keep_their_rank_and_directions_their_length(pieced):
    objective = linear_objective((31, 8), (20, 12))
    low = LowRank(2).draw(objective, KEY, 1).dense[0, : 31 * 8].view(31, 8)
    assert int(torch.linalg.matrix_rank(low)) == 2
    for source in (Sphere(), Orthogonal()):
        square = source.draw(objective, KEY, 1).dense.square().sum()
        assert float(square) == pytest.approx(objective.d)


# --- forwards --------------------------------------------------------------------------------------

DECODERS = pytest.mark.parametrize("family", ["opt", "llama"])  # a tied and an untied head


@DECODERS
@pytest.mark.parametrize("oracle", [Central(1e-3), OneSided(1e-3)])
def test_losses_by_piece_are_those_of_a_moved_theta(pieced, family, oracle):
    objective, data = small_model(family, train="full")
    assert max(map(len, objective.pieces.values())) > 20
    directions = Gaussian().draw(objective, KEY, 2)
    z = directions.dense
    theta = objective.theta.clone()
    with torch.no_grad(), Lift64():
        at = [[objective.at(theta + s * row, data) for row in z] for s in (1e-3, -1e-3)]
        _, found = oracle(objective, data, directions)
        base = objective.value(data)
    up, down = map(torch.stack, at)
    wanted = (up - down) / 2e-3 if isinstance(oracle, Central) else (up - base) / 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    assert torch.equal(objective.theta, theta)


@DECODERS
def test_losses_in_float32_by_piece_are_those_of_a_moved_theta(pieced, family):
    """Each parameter is moved in its own precision, then widened, as a whole one is."""
    objective, data = small_model(family, torch.bfloat16, train="full")
    oracle = Central(0.1)
    oracle.float32 = True
    directions = Gaussian().draw(objective, KEY, 1)
    moved = [(objective.theta + s * directions.row(0)).bfloat16().float() for s in (0.1, -0.1)]
    wide = Objective(objective.module.float(), objective.loss)
    with torch.no_grad():
        up, down = (wide.at(theta, data) for theta in moved)
    objective, data = small_model(family, torch.bfloat16, train="full")
    _, found = oracle(objective, data, Gaussian().draw(objective, KEY, 1))
    torch.testing.assert_close(found[0], (up - down) / 0.2, rtol=1e-4, atol=1e-4)


class Rows(nn.Module):
    """A large table whose rows are looked up; and which the same table scores."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 10)

    def forward(self, batch):
        return torch.tanh(self.table(batch["ids"])) @ self.table.weight.T


def test_only_pieces_with_rows_that_are_looked_up_are_drawn(pieced):
    objective = Objective(Rows(), lambda output, batch: output.sum())
    drawn = []

    def offset(piece):
        drawn.append(piece.place[-1])
        return torch.full((piece.size,), 1.0 + piece.place[-1])

    ids = torch.tensor([[43, 7], [7, 49]])  # of pieces of ten rows
    with torch.no_grad(), objective.perturbed(offset):
        found = objective.module.table(ids)
    table = objective.module.table.weight.detach()
    assert drawn == [0, 4]
    assert torch.equal(found, table[ids] + torch.tensor([[5.0, 1.0], [1.0, 5.0]]).unsqueeze(-1))
    with torch.no_grad(), objective.perturbed(offset):  # any other operator sees all of it
        found = objective.module({"ids": ids})
    moved = table + torch.arange(1.0, 6.0).repeat_interleave(10).unsqueeze(1)
    torch.testing.assert_close(found, torch.tanh(moved[ids]) @ moved.T)


# --- tangents --------------------------------------------------------------------------------------


@DECODERS
@pytest.mark.parametrize("count", [1, 3])
def test_derivatives_by_piece_are_exact_over_one_primal(pieced, family, count):
    objective, data = small_model(family, train="full")
    _, gradient = reference(objective, data)
    directions = Gaussian().draw(objective, KEY, count)
    z = Gaussian().draw(objective, KEY, count).dense
    with Lift64():
        loss, found = Exact()(objective, data, directions)
        torch.testing.assert_close(loss, objective.value(data).detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(found, z @ gradient, rtol=1e-10, atol=1e-11)
    assert "dense" not in vars(directions) and directions.rounded
    estimator = Projected(Exact(), Gaussian(), count)
    cost = CostCounter(estimator)(objective, [data], KEY)
    assert cost.units == pytest.approx(1 + 2 * count, rel=0.02)


# --- the step --------------------------------------------------------------------------------------


def stepped(oracle, dtype, sparing, **options):
    """Theta after three steps, their figures, and the objective."""
    objective, data = small_model("opt", dtype, train="full")
    estimator, optimizer = Projected(oracle, Gaussian(), 2), SGD([objective.theta], **options)
    decide(objective, estimator, optimizer)
    assert objective.sparing
    objective.sparing = sparing
    figures = []
    for step in range(3):
        estimate = estimator.estimate(objective, [data], Key(7, step))
        if sparing:
            figures.append(update(objective, optimizer, estimate))
        else:
            objective.theta.grad = estimate.gradient.clone()
            optimizer.step()
            figures.append(estimate.figures)
    return objective, torch.stack(figures)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("oracle", [Central(1e-2), Exact()])
def test_steps_by_piece_give_the_bits_of_torch_s_on_a_dense_gradient(pieced, oracle, dtype, decay):
    wanted, figures = stepped(oracle, dtype, False, weight_decay=decay)
    found, others = stepped(oracle, dtype, True, weight_decay=decay)
    assert torch.equal(found.theta, wanted.theta)
    assert not torch.equal(found.theta, small_model("opt", dtype, train="full")[0].theta)
    assert torch.equal(figures[:, [0, 2, 3]], others[:, [0, 2, 3]])
    torch.testing.assert_close(figures[:, 1], others[:, 1], rtol=1e-5, atol=0)  # the norm
    assert found._buffer is None and found.theta.grad is None
    assert all(p.grad is None for p in found.module.parameters())


def test_who_needs_a_gradient_has_one(pieced, monkeypatch):
    objective, data = small_model("opt", torch.float32, train="full")
    plain, theta = Projected(Central(1e-2), Gaussian()), objective.theta

    def sparing(estimator, optimizer):
        decide(objective, estimator, optimizer)
        return objective.sparing

    assert sparing(plain, SGD([theta]))
    assert not sparing(plain, SGD([theta], momentum=0.9))
    assert not sparing(plain, torch.optim.AdamW([theta]))
    assert not sparing(Accumulate(plain, 2), SGD([theta]))
    assert not sparing(Backprop(PLANS["none"]), SGD([theta]))
    assert sparing(plain, SGD([theta], weight_decay=0.1))
    estimate = plain.estimate(objective, [data], KEY)
    whole = torch.cat([part for _, part in estimate.made.by_piece()])
    assert torch.equal(estimate.gradient, whole)  # whoever asks for a vector gets one
    monkeypatch.setattr(ground, "PIECE", objective.d)
    assert not sparing(plain, SGD([theta]))


def test_a_loop_of_one_s_own_holds_no_gradient_and_takes_the_same_steps(monkeypatch):
    def trained(sparing):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))
        with monkeypatch.context() as patch:
            patch.setattr(ground, "PIECE", 50)
            steps = costbp.method("zo_vanilla", optimizer=SGD).on(module, lambda m, x: m(x).sum())
            assert steps.objective.sparing
            steps.objective.sparing = sparing
            for _ in range(3):
                steps(torch.ones(2, 5))
        return steps.objective

    found, wanted = trained(True), trained(False)
    assert torch.equal(found.theta, wanted.theta)
    assert found._buffer is None and wanted._buffer is not None


# --- bytes -----------------------------------------------------------------------------------------


def bytes_of(step):
    return step.weights_bytes + step.state_bytes + step.peak_bytes


def decoder(plan, tied):
    """Of OPT-1.3B's sizes in half precision, trained in full."""
    entry = plan.catalog.models["opt_1_3b"]
    values = {"source.bits": None, "source.dtype": "float16"}
    values["source.config"] = {**entry.source.config, "tie_word_embeddings": tied}
    return overlaid(entry, values | {"train": {"kind": "full"}}, "test")


@pytest.mark.parametrize("tied", [True, False])
def test_zeroth_order_in_full_takes_what_inference_takes(plan, tied):
    bench = Bench(decoder(plan, tied))
    objective, data = bench.objective, bench.sample(1, 400)
    with bench.tracing(), Meter([*objective.existing(), *data.values()]) as meter:
        forward_only(objective, data)
    inference = objective.theta.nbytes + meter.peak
    methods = plan.catalog.methods
    zo = bench.cost("zo", methods["zo_vanilla"], 1, 400)
    assert inference <= bytes_of(zo) < 1.02 * inference
    assert zo.peak_by_category["gradients"] == 0 and zo.forward_units == pytest.approx(2)
    exact = bench.cost("fmad", methods["fmad_vanilla"], 1, 400)
    assert bytes_of(exact) < 1.1 * inference and exact.forward_units == pytest.approx(3, 1e-2)
    adam = bench.cost("adam", methods["zo_adam"], 1, 400)
    size = objective.theta.nbytes
    assert bytes_of(adam) - bytes_of(zo) == pytest.approx(3 * size, rel=0.01)  # gradient, moments
    again = bench.cost("zo", methods["zo_vanilla"], 1, 400)  # after one that held a gradient
    assert again == zo


def test_a_small_theta_holds_its_gradient_as_ever(plan):
    entry: ModelEntry = small("opt", FullTraining(kind="full"))
    found = Bench(entry).cost("zo", plan.catalog.methods["zo_vanilla"], 1, 8)
    assert found.peak_by_category["gradients"] == 4 * found.d
