"""Directions: unbiased, of the predicted second moment, and a function of their key alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from costbp.errors import UserError
from costbp.estimators import calibrated
from costbp.estimators.calibrated import Calibrated
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
from costbp.estimators.oracles import Exact
from costbp.estimators.projected import Projected
from costbp.objective import Key
from costbp.theory import variance
from tests.small import examples, linear_objective, network, reference

SHAPES = ((2, 1), (3,), (1, 1))  # d = 6: few, so that S = d and S = d + 2 are far apart
DRAWS = 3000
SIGMAS = 5


def problem(*shapes, dtype=torch.float64):
    """A loss g . theta with unlike |g| in its tensors, and g."""
    objective = linear_objective(*(shapes or SHAPES), dtype=dtype)
    g = torch.randn(objective.d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for index, (start, stop, _) in enumerate(objective.slices.values()):
        g[start:stop] *= 1 + 2 * index
    return objective, g


def probe_of(g):
    """An exact oracle for the loss g . theta."""
    return lambda directions: directions.dense.double() @ g


def estimates(objective, g, source, count=1, step=1, draws=DRAWS):
    """g_hat of many seeds, [draws, d]; a source that calibrates does so for each."""
    rows = []
    for seed in range(draws):
        key = Key(seed, step)
        source.update(objective, key, probe_of(g))
        directions = source.draw(objective, key, count)
        rows.append(directions.combine(directions.dense @ g / count).clone())
    return torch.stack(rows)


def close(samples, expected):
    """Whether the mean of samples is the expected one within 5 of its standard errors, which are
    small enough to say something."""
    tolerance = SIGMAS * float(samples.std()) / math.sqrt(len(samples))
    assert tolerance < 0.3 * abs(expected) or expected == 0
    return abs(float(samples.mean()) - expected) < tolerance


def assert_unbiased(rows, g):
    """The mean is 1 along g / |g|^2 and 0 across it, in several directions."""
    across = torch.randn(4, len(g), generator=torch.Generator().manual_seed(2), dtype=g.dtype)
    across -= (across @ g / (g @ g))[:, None] * g
    assert close(rows @ g / (g @ g), 1.0)
    for other in across:
        assert close(rows @ other, 0.0)


def moments(rows, g):
    """|g_hat|^2 / |g|^2 of each estimate."""
    return rows.square().sum(1) / (g @ g)


PREDICTED = {
    "gaussian": (Gaussian(), variance.gaussian),
    "rademacher": (Rademacher(), variance.fixed_length),
    "sphere": (Sphere(), variance.fixed_length),
    "orthogonal": (Orthogonal(), variance.fixed_length),
    "coordinate": (Coordinate(), variance.fixed_length),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_estimates_are_unbiased_with_the_predicted_second_moment(name):
    source, predicted = PREDICTED[name]
    objective, g = problem()
    rows = estimates(objective, g, source)
    assert_unbiased(rows, g)
    assert close(moments(rows, g), predicted(objective.d))


@pytest.mark.parametrize("name", [name for name in PREDICTED if name != "coordinate"])
def test_directions_have_no_preferred_sign(name):
    """Estimates are even in z, so only a one-sided difference's own error would tell."""
    objective, _ = problem()
    rows = [PREDICTED[name][0].draw(objective, Key(seed, 0), 2).dense[0] for seed in range(500)]
    for entry in torch.stack(rows).T:
        assert close(entry, 0.0)


@pytest.mark.parametrize("name", PREDICTED)
def test_several_directions_have_the_predicted_error(name):
    source, predicted = PREDICTED[name]
    objective, g = problem()
    count, d = 4, objective.d
    rows = estimates(objective, g, source, count, draws=1000)
    assert_unbiased(rows, g)
    expected = variance.relative_error(predicted(d), count)
    if name in ("orthogonal", "coordinate"):
        expected = variance.frame_error(d, count)
    assert close((rows - g).square().sum(1) / (g @ g), expected)


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [(((3, 4), (5,)), 1), (((3, 4), (6, 5), (7,)), 2), (((4, 2, 3), (2, 6)), 2), (((2, 7),), 3)],
)
def test_low_rank_has_the_predicted_second_moment(shapes, rank):
    objective, g = problem(*shapes)
    parts = [
        g[start:stop].view(shape[0], -1) if len(shape) > 1 else g[start:stop]
        for start, stop, shape in objective.slices.values()
    ]
    predicted = variance.low_rank(parts, rank)
    assert (predicted > objective.d + 2.1) == (rank < 3)  # the last shape gets Gaussian entries
    rows = estimates(objective, g, LowRank(rank))
    assert_unbiased(rows, g)
    assert close(moments(rows, g), predicted)


def test_sparse_is_unbiased_on_its_mask():
    objective, g = problem()
    source = Sparse(0.5, refresh=10**9)
    rows = estimates(objective, g, source)
    mask = source.mask
    assert mask is not None and int(mask.sum()) == 1 + 2 + 1
    assert not rows[:, ~mask].any()
    assert_unbiased(rows[:, mask], g[mask])
    assert close(moments(rows[:, mask], g[mask]), variance.gaussian(int(mask.sum())))


# --- calibrated --------------------------------------------------------------------------------


def by_group(objective, g, group):
    """|g| and size of each group of consecutive tensors."""
    parts = [g[start:stop] for start, stop, _ in objective.slices.values()]
    joined = [torch.cat(parts[i : i + group]) for i in range(0, len(parts), group)]
    return [float(p.norm()) for p in joined], [len(p) for p in joined]


def test_calibrated_scales_are_unbiased_with_the_predicted_second_moment():
    objective, g = problem()
    source = Calibrated(4, 2, every=None, use="scale")
    source.update(objective, Key(5, 0), probe_of(g))
    assert source.scales is not None and len(source.scales) == 2
    source.scales = torch.tensor([0.7, 1.5])  # any will do, but not near one
    norms, sizes = by_group(objective, g, 2)
    rows = estimates(objective, g, source)
    assert_unbiased(rows, g)
    assert close(moments(rows, g), variance.scaled(norms, sizes, source.scales.tolist()))


def test_many_probes_find_the_best_scales():
    objective, g = problem((8, 8), (3,), (2, 5))
    source = Calibrated(2000, 1, every=None, use="scale")
    source.update(objective, Key(5, 0), probe_of(g))
    norms, sizes = by_group(objective, g, 1)
    best = variance.best_scaled(norms, sizes)
    assert variance.scaled(norms, sizes, source.scales.tolist()) == pytest.approx(best, rel=1e-3)
    assert best < variance.gaussian(objective.d) - 1
    assert variance.scaled(norms, sizes, [1.0] * 3) == pytest.approx(objective.d + 2)
    for index in range(3):  # it is a minimum
        for factor in (0.8, 1.25):
            other = source.scales.tolist()
            other[index] *= factor
            assert variance.scaled(norms, sizes, other) > best


def test_a_group_whose_probes_vanish_keeps_a_finite_scale():
    objective, g = problem()
    g[:5] = 0
    source = Calibrated(2, 1, every=None, use="scale")
    source.update(objective, Key(5, 0), probe_of(g))
    assert source.scales.isfinite().all() and (source.scales > 0).all()
    assert float(source.scales.max() / source.scales.min()) <= 10.001
    rows = estimates(objective, g, source, draws=20)
    assert rows.isfinite().all()


@pytest.mark.parametrize(("use", "sign"), [("largest", 1), ("smallest", -1)])
def test_expected_extremes_have_their_closed_form(use, sign):
    assert variance.extreme_of_squares(1, use) == pytest.approx(1, abs=1e-4)
    pair = 1 + sign * 2 / math.pi  # max and min are half the sum and half |difference| of two
    assert variance.extreme_of_squares(2, use) == pytest.approx(pair, abs=1e-4)
    drawn = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)).square()
    extreme = drawn.amax(1) if use == "largest" else drawn.amin(1)
    assert close(extreme, variance.extreme_of_squares(4, use))


@pytest.mark.parametrize(("use", "count"), [("largest", 1), ("smallest", 1), ("largest", 2)])
def test_chosen_candidates_are_unbiased_in_the_calibrating_step(use, count, monkeypatch):
    cached = functools.cache(variance.extreme_of_squares)
    monkeypatch.setattr(calibrated, "extreme_of_squares", cached)
    objective, g = problem()
    rows = torch.cat(
        [
            estimates(objective, g, Calibrated(3, 2, 1, use), count, step, draws=1)
            for step in range(1500)
        ]
    )
    assert_unbiased(rows, g)


def test_the_candidate_with_the_largest_or_smallest_derivative_is_chosen():
    objective, g = problem()
    for use, pick in (("largest", torch.argmax), ("smallest", torch.argmin)):
        source, seen = Calibrated(5, 2, None, use), []

        def probe(directions, seen=seen):
            seen.append(directions.dense.clone())
            return seen[-1] @ g

        source.update(objective, Key(5, 0), probe)
        wanted = sum(rows[pick((rows @ g).abs())] for rows in seen)
        torch.testing.assert_close(source.draw(objective, Key(5, 0), 1).dense[0], wanted)
        later = source.draw(objective, Key(5, 1), 1).dense  # other steps are plain
        assert torch.equal(later, Gaussian().draw(objective, Key(5, 1), 1).dense)


def test_calibration_happens_at_its_steps_only():
    objective, g = problem()
    for every, expected in ((None, [0]), (3, [0, 3, 6])):
        source, at = Calibrated(2, 2, every, "scale"), []
        for step in range(8):
            for path in ((0,), (1,), (1,)):  # each micro-batch calibrates, and is charged for it

                def probe(directions, step=step, at=at):
                    at.append(step)
                    return directions.dense @ g

                source.update(objective, Key(5, step, path), probe)
        assert at == [step for step in expected for _ in range(2 * 2)]  # of two groups each


# --- draws -------------------------------------------------------------------------------------

ALL = {
    **{name: source for name, (source, _) in PREDICTED.items()},
    "sparse": Sparse(0.5, 10),
    "low_rank": LowRank(1, 10),
    "calibrated": Calibrated(2, 2, None, "scale"),
    "largest": Calibrated(2, 2, None, "largest"),
}


def drawn(name, key, count=3, dtype=torch.float64):
    objective, _ = problem(dtype=dtype)
    source = ALL[name]
    source.load_state_dict({})
    source.update(objective, key, lambda directions: torch.arange(1.0, 1 + directions.count))
    return objective, source.draw(objective, key, count)


@pytest.mark.parametrize("name", ALL)
def test_directions_come_again_from_their_key_alone(name):
    key = Key(7, 3, (1,))
    first = drawn(name, key)[1].dense
    torch.manual_seed(99)
    assert torch.equal(drawn(name, key)[1].dense, first)
    for other in (Key(8, 3, (1,)), Key(7, 4, (1,)), Key(7, 3, (2,)), Key(7, 3), key.at(0)):
        assert not torch.equal(drawn(name, other)[1].dense, first), other


@pytest.mark.parametrize("name", ALL)
def test_parts_equal_dense_rows_and_are_new_tensors(name):
    objective, directions = drawn(name, Key(7, 3))
    dense = directions.dense.clone()
    for piece in pieces(objective):
        for k in range(directions.count):
            assert torch.equal(directions.part(k, piece).mul_(0) + 1, torch.ones(piece.size))
            assert torch.equal(directions.part(k, piece), dense[k, piece.entries])


@pytest.mark.parametrize("name", ALL)
def test_combine_is_the_weighted_sum_of_duals(name):
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    objective, directions = drawn(name, Key(7, 3))
    dual = directions.dual or directions.part
    wanted = torch.cat(
        [sum(w * dual(k, p) for k, w in enumerate(weights)) for p in pieces(objective)]
    )
    torch.testing.assert_close(directions.combine(weights), wanted, rtol=1e-13, atol=1e-13)
    _ = directions.dense  # a cached block takes another way
    torch.testing.assert_close(directions.combine(weights), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_draws_do_not_depend_on_the_dtype_of_theta(name, dtype):
    objective, wide = drawn(name, Key(7, 3))
    _, narrow = drawn(name, Key(7, 3), dtype=dtype)
    for piece in pieces(objective):
        part = narrow.part(1, piece)
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, wide.part(1, piece).float(), rtol=1e-5, atol=1e-5)
    assert narrow.dense.dtype == dtype


@pytest.mark.parametrize("source", [Orthogonal(), Coordinate()])
def test_d_directions_give_the_gradient_exactly_and_more_are_refused(source):
    objective, data = network(), examples()
    _, gradient = reference(objective, data)
    estimate = Projected(Exact(), source, objective.d).estimate(objective, [data], Key(7, 3))
    torch.testing.assert_close(estimate.gradient, gradient, rtol=1e-11, atol=1e-14)
    with pytest.raises(UserError, match=rf"count <= d.*d = {objective.d}") as caught:
        source.draw(objective, Key(7, 3), objective.d + 1)
    assert "\n" not in str(caught.value)


def test_orthogonal_directions_are_a_frame():
    objective, _ = problem()
    rows = Orthogonal().draw(objective, Key(7, 3), 5).dense
    wanted = objective.d * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(rows @ rows.T, wanted, rtol=0, atol=1e-12)


# --- what sources remember ---------------------------------------------------------------------


def masked(source, objective, step, path=()):
    source.update(objective, Key(7, step, path), lambda directions: None)
    return source.mask.clone()


def test_a_mask_keeps_the_largest_share_of_each_tensor_and_all_ties():
    objective = linear_objective((10, 10), (7,), (5, 4))
    start, stop, _ = objective.slices["parts.2"]
    objective.theta[start:stop] = 0  # as LoRA's B at the start
    mask = masked(Sparse(0.1, 5), objective, 0)
    kept = {}
    for name, (start, stop, _) in objective.slices.items():
        chosen, size = mask[start:stop], objective.theta[start:stop].abs()
        kept[name] = int(chosen.sum())
        assert size[chosen].min() >= size[~chosen].max() if kept[name] < stop - start else True
    assert kept == {"parts.0": 10, "parts.1": 1, "parts.2": 20}


def test_a_mask_is_chosen_anew_at_its_steps_only():
    objective, _ = problem()
    source = Sparse(0.3, 3)
    masks = []
    for step in range(7):
        for path in ((0,), (1,)):  # micro-batches of one step share a mask
            objective.theta.copy_(
                torch.randn(objective.d, generator=torch.Generator().manual_seed(len(masks)))
            )
            masks.append(masked(source, objective, step, path))
    changes = [i for i in range(1, len(masks)) if not torch.equal(masks[i], masks[i - 1])]
    assert changes == [6, 12]  # steps 3 and 6, at their first micro-batch


def test_one_factor_of_low_rank_directions_is_kept():
    objective = linear_objective((9, 8))
    source = LowRank(2, refresh=4)

    def stack(*steps):
        return torch.cat(
            [source.draw(objective, Key(7, step), 1).dense.view(9, 8) for step in steps]
        )

    rank = torch.linalg.matrix_rank
    assert [int(rank(stack(step))) for step in range(5)] == [2] * 5
    assert int(rank(stack(0, 1, 2, 3))) == 2  # one V
    assert int(rank(stack(3, 4))) == 4  # another V
    beside = torch.cat([stack(0).T, stack(1).T])
    assert int(rank(beside)) == 4  # U is fresh at every step


def test_low_rank_says_where_it_is_plain_zeroth_order():
    """LoRA of rank 1 has factors with a side of 1: nothing of rank 2 is left to draw."""
    adapters, block = linear_objective((1, 6), (5, 1), (4,)), linear_objective((1, 6), (5, 3))
    assert "all directions are Gaussian" in LowRank(2).caution(adapters)
    same = [source.draw(adapters, Key(3, 1), 2).dense for source in (LowRank(2), Gaussian())]
    assert torch.equal(*same)
    assert LowRank(2).caution(block) == "" == Gaussian().caution(adapters)
    assert LowRank(3).caution(block)
