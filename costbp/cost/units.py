"""Forward units in closed form: the floor that counted FLOPs are held against.

Exact with the shares of the model's products (``theory/products.py``). With the default shares it
is the rule of thumb for a frozen base with small adapters: every product has one live factor, and
what a plan recomputes is a whole forward pass. Long sequences raise that, since an attention product
has two live factors; layers before the first trained parameter lower it.
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
from costbp.cost.products import Shares

THUMB = Shares()


def _exact(oracle: ExactOracle, count: int, shares: Shares) -> float:
    chunks = -(-count // (oracle.chunk or count))
    return count * shares.live + chunks


ORACLES: dict[type, Callable[[Any, int, Shares], float]] = {
    ExactOracle: _exact,
    CentralOracle: lambda oracle, count, shares: 2.0 * count,
    OneSidedOracle: lambda oracle, count, shares: 1.0 + count,
}


def _backprop(spec: BackpropSpec, tensors: int, blocks: int, shares: Shares) -> float:
    return 1 + shares.live + shares.recomputed.get(spec.plan, 0.0)


def _projected(spec: ProjectedSpec, tensors: int, blocks: int, shares: Shares) -> float:
    oracle = ORACLES[type(spec.oracle)]
    directions = spec.directions
    units = oracle(spec.oracle, directions.count, shares)
    if isinstance(directions, CalibratedDirections) and directions.every:
        groups = -(-tensors // directions.group)
        units += groups * oracle(spec.oracle, directions.candidates, shares) / directions.every
    return units


def _guess(spec: LocalGuessSpec, tensors: int, blocks: int, shares: Shares) -> float:
    return 2.0 + ORACLES[type(spec.oracle)](spec.oracle, blocks + 1, shares)


KINDS: dict[type, Callable[[Any, int, int, Shares], float | None]] = {
    BackpropSpec: _backprop,
    ProjectedSpec: _projected,
    HessianInformedSpec: lambda spec, *_: 3.0,
    LocalGuessSpec: _guess,
    PythonSpec: lambda spec, *_: spec.units,
}


def forward_units(
    method: MethodEntry, tensors: int = 0, blocks: int = 1, shares: Shares = THUMB
) -> float | None:
    """Mean forward units of an optimiser step.

    Backpropagation 2 (forward, activation gradient), 3 with every block recomputed; forward mode
    1 + K; central differences 2K; one-sided 1 + K; accumulation multiplies; SVRG doubles, and
    adds its snapshots' share.

    Args:
        tensors: trainable tensors, whose groups calibration probes.
        blocks: repeated blocks of the model, for locally guessed directions.
        shares: of the model's products; default: the rule of thumb.

    Returns:
        None where an estimator of the user's own states nothing.
    """
    units = KINDS[type(method.estimator)](method.estimator, tensors, blocks, shares)
    if units is None:
        return None
    units *= method.accumulate
    if method.svrg is not None:
        period, batches = method.svrg.period, method.svrg.snapshot_batches
        units *= (2 * (period - 1) + batches) / period
    return units
