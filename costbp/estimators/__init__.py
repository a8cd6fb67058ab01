"""Gradient estimators, and how a catalog entry becomes one.

This is the only place that knows which configuration stands for which part: a new oracle,
direction source or memory plan is one entry of a table here or in its own module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from costbp.config.catalog import (
    BackpropSpec,
    CentralOracle,
    ExactOracle,
    MethodEntry,
    ProjectedSpec,
)
from costbp.estimators.backprop import Backprop
from costbp.estimators.base import Estimate as Estimate
from costbp.estimators.base import Estimator as Estimator
from costbp.estimators.directions import DIRECTIONS
from costbp.estimators.memory_plans import PLANS
from costbp.estimators.oracles import Central, Exact, Oracle
from costbp.estimators.projected import Projected
from costbp.estimators.variance import Accumulate

ORACLES: dict[type, Callable[[Any], Oracle]] = {
    ExactOracle: lambda spec: Exact(spec.chunk),
    CentralOracle: lambda spec: Central(spec.eps),
}

KINDS: dict[type, Callable[[Any], Estimator]] = {
    BackpropSpec: lambda spec: Backprop(PLANS[spec.plan]),
    ProjectedSpec: lambda spec: Projected(
        ORACLES[type(spec.oracle)](spec.oracle),
        DIRECTIONS[spec.directions.kind],
        spec.directions.count,
    ),
}


def build_estimator(method: MethodEntry) -> Estimator:
    """The estimator that a catalog entry describes."""
    estimator = KINDS[type(method.estimator)](method.estimator)
    return Accumulate(estimator, method.accumulate) if method.accumulate > 1 else estimator
