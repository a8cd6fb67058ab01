"""Cost of a step of each method on one (model, task): counted, timed, and held against theory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from costbp.config.study import Cell, Plan
from costbp.estimators.memory_plans import blocks
from costbp.files import write_json
from costbp.measure.step import StepCost, by_category, forward_only, median_seconds
from costbp.models.build import build_model
from costbp.models.prepare import load_prepared, prepare
from costbp.objective import Key
from costbp.theory.cost import forward_units
from costbp.train.devices import device_slot
from costbp.train.loop import Run


def measure_costs(
    plan: Plan, model: str, task: str, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry per method, from the cache where it was measured before.

    An entry holds ``model, task, method, forward_units, theory_units, flops, forward_flops,
    peak_bytes, peak_by_category, state_bytes, weights_bytes, d, seconds, forward_seconds, batch,
    seq, device``.
    FLOPs, units and seconds are those of one optimiser step, mean over the estimator's cycle
    (SVRG's snapshots, calibrations); ``peak_bytes`` is the largest, beyond weights, gradient and
    state (the optimiser's, the estimator's), and ``peak_by_category`` all bytes at that moment;
    ``seconds`` are medians on the study's device.
    """
    folder = plan.study.paths.cache / "cost" / model / task
    paths = [folder / f"{m}-{plan.cost_key(model, task, m)}.json" for m in methods]
    if not all(path.exists() for path in paths):
        with device_slot(plan.study.device, plan.study.paths.cache / "devices") as device:
            for method, path in zip(methods, paths, strict=True):
                if not path.exists():
                    write_json(path, _measure(plan, model, task, method, device))
    return [json.loads(path.read_text()) for path in paths]


def _measure(
    plan: Plan, model: str, task: str, method: str, device: torch.device
) -> dict[str, Any]:
    budgets = [c.budget for c in plan.cells() if (c.model, c.task) == (model, task)]
    budget = next(iter(budgets or plan.catalog.budgets))
    spec = plan.spec(Cell(model, task, method, budget), seed=0)
    data = load_prepared(prepare(plan, model, task))
    assets = plan.study.paths.cache / "assets"
    module = build_model(spec.model, len(data.names), assets, 0, data.width)
    run = Run(spec, module, data, device, assets=assets)
    (batch, *_), estimator = run.batches(), run.estimator
    run.step([batch] * len(estimator.passes(0)), Key(0, 0), StepCost(0, 1.0, 0))  # fills all state
    steps = range(1, estimator.cycle + 1)
    batches = {step: [batch] * len(estimator.passes(step)) for step in steps}
    costs = [run.cost_of(run.objective, batches[step], Key(0, step)) for step in steps]
    seconds: dict[int, float] = {}  # by FLOPs: steps that count the same take the same time
    for step, cost in zip(steps, costs, strict=True):
        if cost.flops not in seconds:
            seconds[cost.flops] = median_seconds(
                partial(estimator.estimate, run.objective, batches[step], Key(0, step)), device.type
            )
    largest = max(costs, key=lambda cost: cost.peak_bytes)
    forward = median_seconds(lambda: forward_only(run.objective, batch), device.type)
    summary = run.summary(test=False)
    ids = batch.get("input_ids")
    return {
        "model": model,
        "task": task,
        "method": method,
        "forward_units": mean(cost.units for cost in costs),
        "theory_units": forward_units(
            spec.method, len(run.objective.slices), len(blocks(run.objective.module))
        ),
        "flops": mean(cost.flops for cost in costs),
        "forward_flops": costs[0].forward_flops,
        "peak_bytes": largest.peak_bytes,
        "peak_by_category": by_category(run.resident(), largest),
        "state_bytes": summary.state_bytes,
        "weights_bytes": summary.weights_bytes,
        "d": summary.d,
        "seconds": mean(seconds[cost.flops] for cost in costs),
        "forward_seconds": forward,
        "batch": spec.task.batch_size,
        "seq": 0 if ids is None else ids.shape[1],
        "device": device.type,
    }


def write_costs(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Store a pair's entries as the rule's output."""
    write_json(path, list(entries))
