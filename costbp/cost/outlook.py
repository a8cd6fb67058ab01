"""What a study will take, before it runs: FLOPs of its budgets, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

from costbp.config.catalog import ModelEntry, TaskEntry
from costbp.config.sources import ConfigSource
from costbp.config.study import Cell, Plan
from costbp.cost.products import SIZES, Product, products, shares
from costbp.tasks.base import load_task


@dataclass(frozen=True)
class Outlook:
    """A study's compute.

    Attributes:
        flops: of training steps, at every example's full length; evaluation is not in it.
        runs: runs they belong to.
        unknown: models whose products can't be read off the catalog, so that they aren't in it.
    """

    flops: float
    runs: int
    unknown: tuple[str, ...]

    def hours(self, tflops: float) -> float:
        """Hours of one device that sustains ``tflops`` TFLOP/s."""
        return self.flops / (tflops * 1e12) / 3600


def outlook(plan: Plan) -> Outlook:
    """FLOPs of all runs of a study whose models are given by configurations."""
    total, runs = 0.0, 0
    unknown: dict[str, None] = {}
    pairs: dict[tuple[str, str], list[Product]] = {}
    for cell in plan.cells():
        entry = plan.catalog.models[cell.model]
        source = entry.source
        if not isinstance(source, ConfigSource) or source.config["model_type"] not in SIZES:
            unknown[cell.model] = None
            continue
        pair = (cell.model, cell.task)
        if pair not in pairs:
            pairs[pair] = _products(entry, source, plan.catalog.tasks[cell.task])
        seeds = len(plan.seeds(cell))
        total += seeds * _flops(plan, cell, pairs[pair])
        runs += seeds
    return Outlook(total, runs, tuple(unknown))


def _products(entry: ModelEntry, source: ConfigSource, task: TaskEntry) -> list[Product]:
    classes = len(load_task(task.loader).names) or 1
    vision = source.config.get("vision_config")
    grid = source.image_side // vision["patch_size"] if vision else 0
    return products(source, entry.train, task.batch_size, task.max_length, classes, grid)


def _flops(plan: Plan, cell: Cell, found: list[Product]) -> float:
    budget = plan.catalog.budgets[cell.budget]
    forward = sum(product.flops for product in found)
    if budget.forward_units is not None:
        return budget.forward_units * forward
    per_step = plan.catalog.methods[cell.method].closed_form(shares(found))
    return (budget.steps or 0) * (per_step or 0.0) * forward


def outlook_line(plan: Plan) -> str:
    """The outlook in one line; empty where nothing is known."""
    found = outlook(plan)
    if not found.runs:
        return ""
    tflops = plan.study.resources.tflops
    text = (
        f"study '{plan.name}': {found.runs} runs, {found.flops / 1e18:.3g} EFLOP of training, about "
        f"{found.hours(tflops):,.3g} GPU hours at {tflops:g} TFLOP/s, evaluation not included"
    )
    return text + (f"; {', '.join(found.unknown)} not counted" if found.unknown else "")
