"""Forward units in closed form: the floor that counted FLOPs are held against.

Exact where every layer but the first products carries a tangent and attention products are a
small share; long sequences raise forward-mode figures, since an attention product has two
factors with tangents (2K + 1 products instead of K + 1), and layers before the first trained
parameter lower them (their tangents are zero).
"""

from __future__ import annotations

from costbp.config.catalog import BackpropSpec, CentralOracle, MethodEntry


def forward_units(method: MethodEntry) -> float:
    """Forward units of a step with a frozen base and small adapters, per optimiser step.

    Backpropagation 2 (forward, activation gradient), 3 with every block recomputed; forward mode
    1 + K; central differences 2K; accumulation multiplies.
    """
    spec = method.estimator
    if isinstance(spec, BackpropSpec):
        units = 2.0 if spec.plan == "none" else 3.0
    elif isinstance(spec.oracle, CentralOracle):
        units = 2.0 * spec.directions.count
    else:
        chunk = spec.oracle.chunk or spec.directions.count
        units = spec.directions.count + -(-spec.directions.count // chunk)
    return units * method.accumulate
