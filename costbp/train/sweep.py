"""Cost against one key of the model, the method or the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from costbp.config.catalog import ModelEntry
from costbp.config.costs import Sweep
from costbp.config.load import overlaid
from costbp.config.methods import MethodEntry
from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.train.trace import Bench

OF_METHODS = "method."  # prefix of keys that belong to the methods' entries


def run_sweep(plan: Plan, name: str) -> Iterator[dict[str, Any]]:
    """One cost entry per value and method, with the ``value`` of the key.

    Raises:
        UserError: the study has no such sweep, or a value is not allowed.
    """
    costs = plan.study.costs
    if costs is None or name not in costs.sweeps:
        names = list(costs.sweeps) if costs else []
        raise UserError(f"costs.sweeps: no sweep '{name}'; allowed: {', '.join(names) or 'none'}")
    sweep = costs.sweeps[name]
    source = f"costs.sweeps.{name}"
    methods = {m: plan.catalog.methods[m] for m in sweep.methods or costs.methods}
    bench: Bench | None = None
    for value in sweep.values:
        model, used, shape = _at(plan.catalog.models[sweep.model], methods, sweep, value, source)
        if bench is None or bench.entry != model:
            bench = Bench(model)
        batch, length = shape.get("batch", costs.batch), shape.get("seq", costs.seq)
        for key, method in used.items():
            yield {
                **bench.cost(key, method, batch, length),
                "sweep": name,
                "model": sweep.model,
                "value": value,
            }


def _at(
    model: ModelEntry, methods: dict[str, MethodEntry], sweep: Sweep, value: int, source: str
) -> tuple[ModelEntry, dict[str, MethodEntry], dict[str, int]]:
    """Model, methods and shape of the batch at one value."""
    if sweep.key in ("batch", "seq"):
        return model, methods, {sweep.key: value}
    if sweep.key.startswith(OF_METHODS):
        key = sweep.key.removeprefix(OF_METHODS)
        return model, {n: overlaid(m, {key: value}, source) for n, m in methods.items()}, {}
    return overlaid(model, {sweep.key: value}, source), methods, {}
