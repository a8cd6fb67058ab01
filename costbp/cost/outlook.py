"""What a study will take, before it runs: FLOPs of its budgets, from configurations alone."""

from __future__ import annotations

from dataclasses import dataclass

from costbp.config.catalog import ModelEntry, TaskEntry
from costbp.config.sources import ConfigSource
from costbp.config.study import Cell, Plan
from costbp.cost.products import SIZES, Product, products, shares
from costbp.errors import UserError
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


def outlook(plan: Plan, *, trials: bool = False) -> Outlook:
    """FLOPs of all runs (or all tuning trials) of a study whose models are given by configurations."""
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
            try:
                pairs[pair] = _products(entry, source, plan.catalog.tasks[cell.task])
            except UserError as error:
                file = f"{plan.study.catalog / 'models'}.yaml"
                raise UserError(f"{file}: {cell.model}.source: {error}") from error
        seeds, tuning = len(plan.seeds(cell)), plan.study.tuning
        total += (tuning.total if trials else seeds) * _flops(plan, cell, pairs[pair])
        runs += tuning.trials if trials else seeds
    return Outlook(total, runs, tuple(unknown))


def _products(entry: ModelEntry, source: ConfigSource, task: TaskEntry) -> list[Product]:
    classes = len(load_task(task.loader).names) or 1
    vision = source.config.get("vision_config")
    grid = source.image_side // vision.get("patch_size", 14) if vision else 0
    return products(source, entry.train, task.batch_size, task.max_length, classes, grid)


def _flops(plan: Plan, cell: Cell, found: list[Product]) -> float:
    budget = plan.catalog.budgets[cell.budget]
    forward = sum(product.flops for product in found)
    if budget.forward_units is not None:
        return budget.forward_units * forward
    per_step = plan.catalog.methods[cell.method].closed_form(shares(found))
    return (budget.steps or 0) * (per_step or 0.0) * forward


def outlook_lines(plan: Plan, *, tunes: bool = False) -> list[str]:
    """What the study will take, and its tuning where that is asked for or comes first; and whether its
    tuned choices are those of its settings. Empty where there is nothing to say."""
    lines = []
    tuning, cells = plan.study.tuning, list(plan.cells())
    if (found := outlook(plan)).runs:
        lines.append(f"study '{plan.name}': {found.runs} runs{_compute(plan, found)}")
    if tunes or tuning.first:
        words = f"{len(cells) * tuning.trials:,} trials of {len(cells)} experiments"
        for unit in ("forward units", "steps"):
            budgets = [plan.catalog.budgets[cell.budget] for cell in cells]
            if amount := sum(b.amount for b in budgets if b.unit == unit):
                words += f", at most {tuning.total * amount:,.0f} {unit}"
        found = outlook(plan, trials=True)
        lines.append(f"tuning '{plan.name}': {words}{_compute(plan, found) if found.runs else ''}")
    aged = sum("other settings" in plan.choice(cell).source for cell in cells)
    if aged:
        lines.append(
            f"warning: {aged} of {len(cells)} choices in {tuning.file} were made under other settings; "
            "they are used, and count as untuned until `snakemake tune` has made them anew"
        )
    return lines


def _compute(plan: Plan, found: Outlook) -> str:
    tflops = plan.study.resources.tflops
    text = (
        f", {found.flops / 1e18:.3g} EFLOP of training, about {found.hours(tflops):,.3g} GPU hours at "
        f"{tflops:g} TFLOP/s, evaluation not included"
    )
    return text + (f"; {', '.join(found.unknown)} not counted" if found.unknown else "")
