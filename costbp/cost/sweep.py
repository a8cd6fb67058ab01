"""Cost against one key of the model, the method or the batch."""

from __future__ import annotations

from collections.abc import Iterator

from costbp.config.load import swept
from costbp.config.study import Plan
from costbp.cost.bench import Bench
from costbp.cost.record import CostRecord
from costbp.errors import UserError


def run_sweep(plan: Plan, name: str) -> Iterator[CostRecord]:
    """One record per value and method, with the ``value`` of the key.

    Raises:
        UserError: the study has no such sweep.
    """
    costs = plan.study.costs
    if costs is None or name not in costs.sweeps:
        names = list(costs.sweeps) if costs else []
        raise UserError(f"costs.sweeps: no sweep '{name}'; allowed: {', '.join(names) or 'none'}")
    sweep = costs.sweeps[name]
    methods = {m: plan.catalog.methods[m] for m in sweep.methods or costs.methods}
    bench: Bench | None = None
    for value in sweep.values:
        model, used, shape = swept(
            plan.catalog.models[sweep.model], methods, sweep, value, f"costs.sweeps.{name}"
        )
        if bench is None or bench.entry != model:
            bench = Bench(model, name=sweep.model)
        batch, length = shape.get("batch", costs.batch), shape.get("seq", costs.seq)
        for key, method in used.items():
            record = bench.cost(key, method, batch, length)
            yield record.model_copy(update={"value": value})
