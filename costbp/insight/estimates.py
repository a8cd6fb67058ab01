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

CHUNK = 64  # tangents carried at a time
ROOM = 2**25  # numbers of directions at once
ORACLES: dict[str, Callable[[], Any]] = {"exact": lambda: Exact(CHUNK), "central": Central}


def estimates(
    bench: Bench, insight: Insight, kinds: Sequence[str], counts: Sequence[int]
) -> Iterator[Point]:
    """Relative squared errors of kinds of directions, and cosines of Gaussian ones; no point where
    K exceeds d or K x d numbers too many."""
    for oracle, series, count in product(ORACLES, kinds, counts):
        if count <= bench.d and count * bench.d <= ROOM:
            spec = insight.directions[series]
            yield from _points(bench, insight, oracle, series, spec, count)


def _points(
    bench: Bench, insight: Insight, oracle: str, series: str, spec: Any, count: int
) -> Iterator[Point]:
    objective, g = bench.objective, bench.gradient.double()
    cosines, errors, expected = [], [], []
    for repeat in range(max(insight.repeats, insight.draws // count)):
        source = spec.build()  # anew: a source may remember what it measured
        estimator = Projected(ORACLES[oracle](), source, count)
        key = Key(insight.seed + repeat, 0)
        if repeat == 0:
            probe = settle(objective, estimator, bench.batch, key)
        if probe is not None:
            probe.adopt(estimator)
        found = estimator.estimate(objective, [bench.batch], key).gradient.double()
        cosines.append(float(torch.cosine_similarity(found, g, dim=0)))
        errors.append(float((found - g).square().sum() / g.square().sum()))
        expected.append(predicted_error(source, bench, count))
    about: dict[str, Any] = {
        "problem": bench.name,
        "series": series,
        "oracle": oracle,
        "d": bench.d,
        "count": count,
    }
    known = [value for value in expected if value is not None]
    wanted = sum(known) / len(known) if known else None
    yield Point.of(errors, **about, question="error", predicted=wanted)
    if isinstance(source, Gaussian):
        wanted = variance.expected_cosine(bench.d, count)
        yield Point.of(cosines, **about, question="cosine", predicted=wanted)


def predicted_error(source: Source, bench: Bench, count: int) -> float | None:
    """E|g_hat - g|^2 / |g|^2 of K of a source's directions at this gradient, as the source stands;
    None for a kind without a formula."""
    if (moment := MOMENTS.get(type(source))) is not None:
        return variance.relative_error(moment(source, bench), count)
    whole = ERRORS.get(type(source))
    return None if whole is None else whole(source, bench, count)


def _parts(bench: Bench) -> dict[str, Tensor]:
    """The gradient by parameter, as matrices."""
    return {
        name: bench.gradient[start:stop].view(matrix(shape))
        for name, (start, stop, shape) in bench.objective.slices.items()
    }


def _low_rank(source: LowRank, bench: Bench) -> float:
    return variance.low_rank(list(_parts(bench).values()), source.rank)


def _calibrated(source: Calibrated, bench: Bench) -> float:
    assert source.scales is not None and source.use == "scale"
    group_of = source.groups(bench.objective)
    parts = _parts(bench)
    scales = [float(source.scales[group_of[name]]) for name in parts]
    norms, sizes = [float(g.norm()) for g in parts.values()], [g.numel() for g in parts.values()]
    return variance.scaled(norms, sizes, scales)


def _sparse(source: Sparse, bench: Bench, count: int) -> float:
    assert source.mask is not None
    share = bench.gradient[source.mask].square().sum() / bench.gradient.square().sum()
    return masked_error(int(source.mask.sum()), float(share), count)


MOMENTS: dict[type[Source], Callable[[Any, Bench], float]] = {  # S of one direction
    Gaussian: lambda source, bench: variance.gaussian(bench.d),
    Rademacher: lambda source, bench: variance.fixed_length(bench.d),
    Sphere: lambda source, bench: variance.fixed_length(bench.d),
    LowRank: _low_rank,
    Calibrated: _calibrated,
}
ERRORS: dict[type[Source], Callable[[Any, Bench, int], float]] = {
    Orthogonal: lambda source, bench, count: variance.frame_error(bench.d, count),
    Coordinate: lambda source, bench, count: variance.frame_error(bench.d, count),
    Sparse: _sparse,
}
