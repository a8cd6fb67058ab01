"""How far estimates are from the gradient: cosine and squared error, by kind and number of directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from costbp.config.insight import Insight
from costbp.estimators.calibrated import Calibrated
from costbp.estimators.directions import (
    Coordinate,
    Gaussian,
    LowRank,
    Orthogonal,
    Rademacher,
    Source,
    Sparse,
    Sphere,
    matrix,
)
from costbp.estimators.oracles import Central, Exact
from costbp.estimators.probe import settle
from costbp.estimators.projected import Projected
from costbp.insight.points import Point
from costbp.insight.problems import Bench
from costbp.objective import Key
from costbp.theory import variance
from costbp.theory.descent import masked_error

Formula = Callable[[Any, Bench, int], float]
CHUNK = 64  # tangents carried at a time
ROOM = 2**25  # numbers of directions at once
ORACLES: dict[str, Callable[[], Any]] = {"exact": lambda: Exact(CHUNK), "central": Central}


def _parts(bench: Bench) -> dict[str, Tensor]:
    """The gradient by parameter, as matrices."""
    return {
        name: bench.gradient[start:stop].view(matrix(shape))
        for name, (start, stop, shape) in bench.objective.slices.items()
    }


def _low_rank(source: LowRank, bench: Bench) -> float:
    return variance.low_rank(list(_parts(bench).values()), source.rank)


def _calibrated(source: Calibrated, bench: Bench) -> float:
    assert source.scales is not None
    group_of, parts = source.groups(bench.objective), _parts(bench)
    scales = [float(source.scales[group_of[name]]) for name in parts]
    norms, sizes = [float(g.norm()) for g in parts.values()], [g.numel() for g in parts.values()]
    return variance.scaled(norms, sizes, scales)


def _sparse(source: Sparse, bench: Bench, count: int) -> float:
    assert source.mask is not None
    share = bench.gradient[source.mask].square().sum() / bench.gradient.square().sum()
    return masked_error(int(source.mask.sum()), float(share), count)


def _independent(moment: Callable[[Any, Bench], float]) -> Formula:
    """The error of a mean of independent estimates of this S."""
    return lambda source, bench, count: variance.relative_error(moment(source, bench), count)


def _frame(source: Source, bench: Bench, count: int) -> float:
    return variance.frame_error(bench.d, count)


GAUSSIAN = _independent(lambda source, bench: variance.gaussian(bench.d))
FIXED = _independent(lambda source, bench: variance.fixed_length(bench.d))
KINDS: dict[str, tuple[Callable[[], Source], Formula]] = {  # what draws, and E|g_hat - g|^2 / |g|^2
    "Gaussian": (Gaussian, GAUSSIAN),
    "Rademacher": (Rademacher, FIXED),
    "sphere": (Sphere, FIXED),
    "orthogonal": (Orthogonal, _frame),
    "coordinate": (Coordinate, _frame),
    "low rank": (lambda: LowRank(rank=1), _independent(_low_rank)),
    "sparse": (lambda: Sparse(fraction=0.1, refresh=1), _sparse),
    "calibrated": (lambda: Calibrated(4, 2, every=1, use="scale"), _independent(_calibrated)),
}


def estimates(
    bench: Bench, insight: Insight, kinds: Sequence[str], counts: Sequence[int]
) -> Iterator[Point]:
    """Relative squared errors of kinds of directions, and cosines of Gaussian ones; no point where
    K exceeds d or K x d numbers too many."""
    for oracle, kind, count in product(ORACLES, kinds, counts):
        if count > bench.d or count * bench.d > ROOM:
            continue
        cosines, errors, expected = _measured(bench, insight, oracle, kind, count)
        about: dict[str, Any] = {"problem": bench.name, "d": bench.d, "count": count}
        about |= {"series": kind, "oracle": oracle}
        yield Point.of(errors, **about, question="error", predicted=sum(expected) / len(expected))
        if kind == "Gaussian":
            wanted = variance.expected_cosine(bench.d, count)
            yield Point.of(cosines, **about, question="cosine", predicted=wanted)


def _measured(
    bench: Bench, insight: Insight, oracle: str, kind: str, count: int
) -> tuple[list[float], list[float], list[float]]:
    """Cosine, error and predicted error of each repeat."""
    g, rows = bench.gradient.double(), []
    for repeat in range(max(insight.repeats, insight.draws // count)):
        make, formula = KINDS[kind]
        source = make()  # anew: a source may remember what it measured
        estimator = Projected(ORACLES[oracle](), source, count)
        key = Key(insight.seed + repeat, 0)
        if repeat == 0:
            probe = settle(bench.objective, estimator, bench.batch, key)
        if probe is not None:
            probe.adopt(estimator)
        found = estimator.estimate(bench.objective, [bench.batch], key).gradient.double()
        error = float((found - g).square().sum() / g.square().sum())
        cosine = float(torch.cosine_similarity(found, g, dim=0))
        rows.append((cosine, error, formula(source, bench, count)))
    cosines, errors, expected = map(list, zip(*rows, strict=True))
    return cosines, errors, expected
