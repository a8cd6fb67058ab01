"""Gradient estimators, and how a catalog entry becomes one.

This is the only place that knows which configuration stands for which part: a new oracle,
direction source or memory plan is one entry of a table here or in its own module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from costbp.config.methods import (
    BackpropSpec,
    CalibratedDirections,
    CentralOracle,
    ExactOracle,
    HessianInformedSpec,
    LocalGuessSpec,
    LowRankDirections,
    MethodEntry,
    OneSidedOracle,
    PlainDirections,
    ProjectedSpec,
    PythonSpec,
    SparseDirections,
)
from costbp.estimators.backprop import Backprop
from costbp.estimators.base import Estimate as Estimate
from costbp.estimators.base import Estimator as Estimator
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
)
from costbp.estimators.guess import LocalGuess
from costbp.estimators.hessian_informed import HessianInformed
from costbp.estimators.memory_plans import PLANS, ByteBudget, MemoryPlan
from costbp.estimators.oracles import Central, Exact, OneSided, Oracle
from costbp.estimators.projected import Projected
from costbp.estimators.shaping import Shaped
from costbp.estimators.variance import SVRG, Accumulate

ORACLES: dict[type, Callable[[Any], Oracle]] = {
    ExactOracle: lambda spec: Exact(spec.chunk),
    CentralOracle: lambda spec: Central(spec.eps, spec.batched),
    OneSidedOracle: lambda spec: OneSided(spec.eps, spec.batched),
}

PLAIN: dict[str, type[Source]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthogonal": Orthogonal,
    "coordinate": Coordinate,
}

SOURCES: dict[type, Callable[[Any], Source]] = {
    PlainDirections: lambda spec: PLAIN[spec.kind](),
    SparseDirections: lambda spec: Sparse(spec.fraction, spec.refresh),
    LowRankDirections: lambda spec: LowRank(spec.rank, spec.refresh),
    CalibratedDirections: lambda spec: Calibrated(
        spec.candidates, spec.group, spec.every, spec.use
    ),
}


def _plan(spec: BackpropSpec) -> MemoryPlan:
    return ByteBudget(spec.mebibytes) if spec.mebibytes is not None else PLANS[spec.plan]


def _oracle(spec: Any) -> Oracle:
    return ORACLES[type(spec)](spec)


def _projected(spec: ProjectedSpec) -> Projected:
    return Projected(
        _oracle(spec.oracle),
        SOURCES[type(spec.directions)](spec.directions),
        spec.directions.count,
        spec.scale,
        spec.clip,
    )


KINDS: dict[type, Callable[[Any], Estimator]] = {
    BackpropSpec: lambda spec: Backprop(_plan(spec)),
    ProjectedSpec: _projected,
    HessianInformedSpec: lambda spec: HessianInformed(Central(spec.eps), spec.smoothing),
    LocalGuessSpec: lambda spec: LocalGuess(_oracle(spec.oracle)),
    PythonSpec: lambda spec: spec.call(Estimator),
}


def build_estimator(method: MethodEntry) -> Estimator:
    """The estimator that a catalog entry describes, with its wrappers: accumulation innermost,
    then SVRG, then clipping and signs."""
    estimator = KINDS[type(method.estimator)](method.estimator)
    if method.accumulate > 1:
        estimator = Accumulate(estimator, method.accumulate)
    if method.svrg is not None:
        estimator = SVRG(estimator, method.svrg.period, method.svrg.snapshot_batches)
    clip = method.clip
    if clip.norm is not None or clip.value is not None or method.sign:
        estimator = Shaped(estimator, clip.norm, clip.value, method.sign)
    return estimator
