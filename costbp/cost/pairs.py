"""Costs of the methods that a study runs on a (model, task): traced without weights where the model's
configuration is known, else counted on the task's own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from costbp.config.catalog import ModelEntry
from costbp.config.entries import short_hash
from costbp.config.shares import Shares
from costbp.config.sources import TRACED, ConfigSource, FolderSource, HubSource, Source
from costbp.config.study import Cell, Plan
from costbp.console import say
from costbp.cost.bench import CLASSES, Bench
from costbp.cost.record import CostRecord
from costbp.cost.step import measure_step
from costbp.data.pairs import Pair
from costbp.data.prepare import load_prepared, prepare
from costbp.data.stream import BatchStream
from costbp.device import to_device
from costbp.device_pool import device_slot
from costbp.errors import UserError
from costbp.estimators.memory_plans import blocks
from costbp.files import read_cached, write_json
from costbp.models.build import build_model
from costbp.models.loss import cross_entropy
from costbp.models.weights import DROPOUTS, configuration
from costbp.objective import Objective
from costbp.tasks.base import load_task

T = TypeVar("T")


def pair_costs(
    plan: Plan, model: str, task: str, methods: Sequence[str], *, timed: bool = False
) -> list[CostRecord]:
    """One record per method, from the cache where it was measured before.

    Seconds are those of the study's device; None where traced, or unless ``timed``: a study's times
    are those of its runs.
    """
    traced = [traced_cost(plan, model, task, method) for method in methods]
    if all(traced):
        return [record for record in traced if record is not None]
    cached = {method: _cached(plan, model, task, method) for method in methods}
    known = {method: _read(path) for method, path in cached.items()}
    missing = [m for m, r in known.items() if r is None or (timed and r.seconds is None)]
    if missing:
        # a job that was to trace has asked for no GPU
        with device_slot("cpu" if plan.is_traced(model) else plan.study.device) as device:
            for method in missing:
                known[method] = _on_data(plan, model, task, method, device, timed)
                _write(cached[method], known[method])
    return [record for record in known.values() if record is not None]


def _cached(plan: Plan, model: str, task: str, method: str) -> Path:
    folder = plan.study.paths.cache / "cost" / model / task
    return folder / f"{method}-{plan.cost_key(model, task, method)}.json"


def _read(path: Path) -> CostRecord | None:
    return read_cached(path, CostRecord.model_validate_json)


def _write(path: Path, record: CostRecord | None) -> None:
    if record is not None:
        write_json(path, record.model_dump(mode="json"))


def traced_cost(plan: Plan, model: str, task: str, method: str) -> CostRecord | None:
    """The cost of one method, traced on batches of the task's full size, without weights or
    device; None for a model whose configuration isn't known, or that can't be traced."""
    if traceable(plan.catalog.models[model], plan.study.paths.cache / "assets") is None:
        return None
    path = _cached(plan, model, task, method)
    known = _read(path)
    if known is None:
        data = plan.catalog.tasks[task]
        given = plan.catalog.methods[method], data.batch_size, data.max_length
        known = on_bench(plan, model, task, lambda bench: bench.cost(method, *given, task=task))
        _write(path, known)
    return known


def on_bench(plan: Plan, model: str, task: str, find: Callable[[Bench], T]) -> T | None:
    """What is found on a pair's model without weights; None for one whose configuration isn't known,
    or that can't be traced."""
    entry = traceable(plan.catalog.models[model], plan.study.paths.cache / "assets")
    if entry is None:
        return None
    try:
        names = load_task(plan.catalog.tasks[task].loader).names
        return find(_bench(model, entry, len(names) or CLASSES))
    except UserError as error:
        if isinstance(plan.catalog.models[model].source, ConfigSource):
            raise
        say(f"warning: model '{model}' is not traced: {error}")
        return None


_BENCHES: dict[str, Bench] = {}


def _bench(name: str, entry: ModelEntry, classes: int) -> Bench:
    """The last bench: a pair's methods are traced one after the other on one model."""
    key = short_hash([name, entry.identity(), classes])
    if key not in _BENCHES:
        _BENCHES.clear()
        _BENCHES[key] = Bench(entry, "meta", classes, name)
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
        shape = (model, data.batch_size, data.max_length, classes)
        shapes.setdefault(shape, []).append((model, task))
    for (model, batch, length, _), pairs in shapes.items():
        tasks = ", ".join(task for _, task in pairs)
        traced = {m: traced_cost(plan, *pairs[0], m) for m in plan.pairs()[pairs[0]]}
        found = {m: None if record is None else record.bytes for m, record in traced.items()}
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
    if isinstance(source, ConfigSource):
        return entry.model_copy(update={"source": source.model_copy(update={"config": values})})
    held = {name: getattr(source, name) for name in Source.model_fields}
    config = ConfigSource(kind="config", config=values, **held)
    return entry.model_copy(update={"source": config})


def _on_data(
    plan: Plan, model: str, task: str, method: str, device: torch.device, timed: bool
) -> CostRecord:
    entry, chosen, rows = (
        plan.catalog.models[model],
        plan.catalog.methods[method],
        plan.catalog.tasks[task].batch_size,
    )
    data = load_prepared(prepare(Pair.of(plan, model, task)))
    assets = plan.study.paths.cache / "assets"
    module = build_model(entry, len(data.names), assets, 0, data.width, device, data.words)
    objective = Objective(module, cross_entropy)
    batch = to_device(BatchStream(data.splits["train"], rows, 0)[0], device)
    used = plan.choice(Cell(model, task, method, "")).optimizer  # tuned or not, as in training
    optimizer = used.build(objective.theta)
    found = measure_step(objective, chosen.build(), optimizer, batch, timed=timed)
    shares = Shares(tensors=len(objective.slices), blocks=len(blocks(module)))
    return CostRecord(
        model=model,
        task=task,
        method=method,
        device=device.type,
        batch=rows,
        seq=batch["attention_mask"].shape[1] if "attention_mask" in batch else 0,
        closed_form=chosen.closed_form(shares),
        **asdict(found),
    )
