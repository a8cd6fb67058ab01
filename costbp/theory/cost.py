"""Forward units in closed form: the floor that counted FLOPs are held against.

Exact where every layer but the first products carries a tangent and attention products are a
small share; long sequences raise forward-mode figures, since an attention product has two
factors with tangents (2K + 1 products instead of K + 1), and layers before the first trained
parameter lower them (their tangents are zero).
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
    MethodEntry,
    OneSidedOracle,
    ProjectedSpec,
    PythonSpec,
)

RECOMPUTING = {"per_block", "sqrt", "byte_budget"}


def _exact(oracle: ExactOracle, count: int) -> float:
    chunks = -(-count // (oracle.chunk or count))
    return float(count + chunks)


ORACLES: dict[type, Callable[[Any, int], float]] = {
    ExactOracle: _exact,
    CentralOracle: lambda oracle, count: 2.0 * count,
    OneSidedOracle: lambda oracle, count: 1.0 + count,
}


def _projected(spec: ProjectedSpec, tensors: int, blocks: int) -> float:
    oracle = ORACLES[type(spec.oracle)]
    directions = spec.directions
    units = oracle(spec.oracle, directions.count)
    if isinstance(directions, CalibratedDirections) and directions.every:
        groups = -(-tensors // directions.group)
        units += groups * oracle(spec.oracle, directions.candidates) / directions.every
    return units


KINDS: dict[type, Callable[[Any, int, int], float | None]] = {
    BackpropSpec: lambda spec, *_: 3.0 if spec.plan in RECOMPUTING else 2.0,
    ProjectedSpec: _projected,
    HessianInformedSpec: lambda spec, *_: 3.0,
    LocalGuessSpec: lambda spec, tensors, blocks: 2.0 + _exact(spec.oracle, blocks + 1),
    PythonSpec: lambda spec, *_: spec.units,
}


def forward_units(method: MethodEntry, tensors: int = 0, blocks: int = 1) -> float | None:
    """Mean forward units of an optimiser step, for a frozen base with small adapters.

    Backpropagation 2 (forward, activation gradient), 3 with every block recomputed; forward mode
    1 + K; central differences 2K; one-sided 1 + K; accumulation multiplies; SVRG doubles, and
    adds its snapshots' share.

    Args:
        tensors: trainable tensors, whose groups calibration probes.
        blocks: repeated blocks of the model, for locally guessed directions.

    Returns:
        None where an estimator of the user's own states nothing.
    """
    units = KINDS[type(method.estimator)](method.estimator, tensors, blocks)
    if units is None:
        return None
    units *= method.accumulate
    if method.svrg is not None:
        period, batches = method.svrg.period, method.svrg.snapshot_batches
        units *= (2 * (period - 1) + batches) / period
    return units
