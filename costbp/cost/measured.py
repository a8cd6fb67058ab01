"""Cost of a step of each method on one (model, task): traced without weights where the model's
configuration is known, else counted on its own batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from costbp.config.catalog import ModelEntry
from costbp.config.entries import short_hash
from costbp.config.sources import TRACED, ConfigSource, FolderSource, HubSource, Source
from costbp.config.study import Cell, Plan
from costbp.console import say
from costbp.cost.step import StepCost, by_category, forward_only, median_seconds
from costbp.cost.trace import CLASSES, UNTIMED, Bench
from costbp.cost.units import forward_units
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.device_pool import device_slot
from costbp.errors import UserError
from costbp.estimators.memory_plans import blocks
from costbp.files import write_json
from costbp.models.build import build_model
from costbp.models.weights import DROPOUTS, configuration
from costbp.objective import Key
from costbp.tasks.base import load_task
from costbp.train.loop import Run


def measure_costs(
    plan: Plan, model: str, task: str, methods: Sequence[str], *, timed: bool = False
) -> list[dict[str, Any]]:
    """One entry per method, from the cache where it was measured before.

    An entry holds ``model, task, method, forward_units, theory_units, flops, forward_flops,
    peak_bytes, peak_by_category, state_bytes, weights_bytes, d, seconds, forward_seconds, batch,
    seq, device``.
    FLOPs, units and seconds are those of one optimiser step, mean over the estimator's cycle
    (SVRG's snapshots, calibrations); ``peak_bytes`` is the largest, beyond weights, gradient and
    state (the optimiser's, the estimator's), and ``peak_by_category`` all bytes at that moment.
    ``seconds`` are medians on the study's device; None where traced, or unless ``timed``: a
    study's times are those of its runs.
    """
    found = [traced_cost(plan, model, task, method) for method in methods]
    if all(found):
        return [entry for entry in found if entry is not None]
    paths = [_cached(plan, model, task, method) for method in methods]
    known = {path: _read(path) for path in paths}
    missing = {p for p, e in known.items() if e is None or (timed and e["seconds"] is None)}
    if missing:
        # a job that was to trace has asked for no GPU
        with device_slot("cpu" if plan.is_traced(model) else plan.study.device) as device:
            for method, path in zip(methods, paths, strict=True):
                if path in missing:
                    write_json(path, _measure(plan, model, task, method, device, timed))
    return [json.loads(path.read_text()) for path in paths]


def _cached(plan: Plan, model: str, task: str, method: str) -> Path:
    folder = plan.study.paths.cache / "cost" / model / task
    return folder / f"{method}-{plan.cost_key(model, task, method)}.json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    entry: dict[str, Any] = json.loads(path.read_text())
    return entry


def traced_cost(plan: Plan, model: str, task: str, method: str) -> dict[str, Any] | None:
    """The entry of one method, traced on batches of the task's full size, without weights or
    device; None for a model whose configuration isn't known, or that can't be traced."""
    entry = traceable(plan.catalog.models[model], plan.study.paths.cache / "assets")
    if entry is None:
        return None
    path = _cached(plan, model, task, method)
    known = _read(path)
    if known is None:
        data = plan.catalog.tasks[task]
        try:
            bench = _bench(entry, len(load_task(data.loader).names) or CLASSES)
            given = plan.catalog.methods[method], data.batch_size, data.max_length
            known = {**bench.cost(method, *given), "model": model, "task": task}
        except UserError as error:
            if isinstance(plan.catalog.models[model].source, ConfigSource):
                raise
            say(f"warning: model '{model}' is not traced: {error}")
            return None
        write_json(path, known)
    return known


_BENCHES: dict[str, Bench] = {}


def _bench(entry: ModelEntry, classes: int) -> Bench:
    """The last bench: a pair's methods are traced one after the other on one model."""
    key = short_hash([entry.identity(), classes])
    if key not in _BENCHES:
        _BENCHES.clear()
        _BENCHES[key] = Bench(entry, "meta", classes)
    return _BENCHES[key]


def memory_needs(plan: Plan) -> Iterator[tuple[str, dict[str, int | None]]]:
    """Bytes at the peak of each method's step, weights included, for every model and shape of batch
    of a study; None where it isn't traced. Tasks of one shape (and, for classifiers, as many classes)
    are one row."""
    shapes: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for model, task in plan.pairs():
        data = plan.catalog.tasks[task]
        classifies = plan.catalog.models[model].source.form == "classifier"
        classes = len(load_task(data.loader).names) if classifies else 0
        shapes.setdefault((model, data.batch_size, data.max_length, classes), []).append(
            (model, task)
        )
    for (model, batch, length, _), pairs in shapes.items():
        tasks = ", ".join(task for _, task in pairs)
        found: dict[str, int | None] = {}
        for method in plan.pairs()[pairs[0]]:
            entry = traced_cost(plan, *pairs[0], method)
            found[method] = None if entry is None else sum(entry["peak_by_category"].values())
        yield f"{model}, {batch} x {length} ({tasks})", found


def traceable(entry: ModelEntry, assets: Path) -> ModelEntry | None:
    """The entry with the configuration of its weights as source, as far as it is known here."""
    source = entry.source
    if isinstance(source, ConfigSource):
        values = dict(source.config)
    elif isinstance(source, HubSource | FolderSource) and source.form in TRACED:
        try:
            values = configuration(entry, assets)
        except UserError:
            return None
    else:
        return None
    for part in (values, values.get("text_config", {})):
        part |= {n: entry.dropout for n in DROPOUTS if n in part and entry.dropout is not None}
    held = {name: getattr(source, name) for name in Source.model_fields}
    config = ConfigSource(kind="config", config=values, **held)
    return entry.model_copy(update={"source": config})


def _measure(
    plan: Plan, model: str, task: str, method: str, device: torch.device, timed: bool
) -> dict[str, Any]:
    budgets = [c.budget for c in plan.cells() if (c.model, c.task) == (model, task)]
    budget = next(iter(budgets or plan.catalog.budgets))
    spec = plan.spec(Cell(model, task, method, budget), seed=0)
    data = load_prepared(prepare(Pair.of(plan, model, task)))
    assets = plan.study.paths.cache / "assets"
    module = build_model(spec.model, len(data.names), assets, 0, data.width, device)
    run = Run(spec, module, data, device, assets=assets)
    (batch, *_), estimator = run.batches(), run.estimator
    run.step([batch] * len(estimator.passes(0)), Key(0, 0), StepCost(0, 1.0, 0))  # fills all state
    steps = range(1, estimator.cycle + 1)
    batches = {step: [batch] * len(estimator.passes(step)) for step in steps}
    costs = [run.cost_of(run.objective, batches[step], Key(0, step)) for step in steps]
    spent: dict[int, float] = {}  # by FLOPs: steps that count the same take the same time
    for step, cost in zip(steps, costs, strict=True):
        if timed and cost.flops not in spent:
            once = partial(estimator.estimate, run.objective, batches[step], Key(0, step))
            spent[cost.flops] = median_seconds(once, device)
    seconds: dict[str, float | None] = dict(UNTIMED)
    if timed:
        seconds = {
            "seconds": mean(spent[cost.flops] for cost in costs),
            "forward_seconds": median_seconds(partial(forward_only, run.objective, batch), device),
        }
    largest = max(costs, key=lambda cost: cost.peak_bytes)
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
        **seconds,
        "batch": spec.task.batch_size,
        "seq": 0 if ids is None else ids.shape[1],
        "device": device.type,
    }


def write_costs(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Store a pair's entries as the rule's output."""
    write_json(path, list(entries))
