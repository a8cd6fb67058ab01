"""What a study will take, before it runs: FLOPs of its budgets and what its jobs ask a scheduler for, from
configurations alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from costbp.config.sources import ConfigSource
from costbp.config.study import Cell, Plan
from costbp.cost.products import SIZES, Product, knows, products, shares
from costbp.errors import UserError
from costbp.tasks.base import load_task

PROCESS_MB = 2500  # a process that trains, its data, and a small model
GPU_PROCESS_MB = 6000  # the same with CUDA's libraries
MINUTES = 60  # of a job of which no more is known
SLACK = 2  # a run over its FLOPs: evaluation, start-up, a GPU that waits for its host


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
    known = Known(plan)
    flops = {cell: known.flops(cell, trials=trials) for cell in plan.cells()}
    counted = [cell for cell, found in flops.items() if found is not None]
    unknown = dict.fromkeys(cell.model for cell in flops if cell not in counted)
    runs = [plan.study.tuning.trials if trials else len(plan.seeds(cell)) for cell in counted]
    return Outlook(sum(flops[cell] or 0.0 for cell in counted), sum(runs), tuple(unknown))


@dataclass
class Known:
    """What configurations tell of a study's experiments; products are listed once a pair."""

    plan: Plan
    _pairs: dict[tuple[str, str], list[Product]] = field(default_factory=dict)

    def products(self, model: str, task: str) -> list[Product] | None:
        """The products of a forward pass; None for a model that isn't given by a configuration."""
        entry, data = self.plan.catalog.models[model], self.plan.catalog.tasks[task]
        source = entry.source
        if not isinstance(source, ConfigSource) or source.config["model_type"] not in SIZES:
            return None
        if not knows(entry.train):
            return None
        if (model, task) not in self._pairs:
            classes = len(load_task(data.loader).names) or 1
            vision = source.config.get("vision_config")
            grid = source.image_side // vision.get("patch_size", 14) if vision else 0
            shape = data.batch_size, data.max_length, classes, grid
            try:
                self._pairs[model, task] = products(source, entry.train, *shape)
            except UserError as error:
                file = f"{self.plan.study.catalog / 'models'}.yaml"
                raise UserError(f"{file}: {model}.source: {error}") from error
        return self._pairs[model, task]

    def flops(self, cell: Cell, *, trials: bool = False) -> float | None:
        """Of an experiment's runs, or of its tuning trials; None where its products aren't known."""
        plan, found = self.plan, self.products(cell.model, cell.task)
        if found is None:
            return None
        budget = plan.catalog.budgets[cell.budget]
        units = budget.forward_units
        if units is None:
            per_step = plan.catalog.methods[cell.method].closed_form(shares(found))
            units = (budget.steps or 0) * (per_step or 0.0)
        times = plan.study.tuning.total if trials else len(plan.seeds(cell))
        return times * units * sum(product.flops for product in found)

    def mem_mb(self, attempt: int, model: str = "", task: str = "") -> int:
        """Memory of a job on its machine: a process and, where it reads a model's weights, their file as
        if all of it were read at once. What a GPU holds isn't in it."""
        asked, found = self.plan.study.resources, self.products(model, task) if model else None
        base: float = asked.mem_mb or PROCESS_MB
        if asked.mem_mb is None and found:
            source, data = self.plan.catalog.models[model].source, self.plan.catalog.tasks[task]
            assert isinstance(source, ConfigSource)
            text = source.config.get("text_config", source.config)
            # a forward pass takes two FLOPs a token and weight; embeddings are looked up
            weights = sum(p.flops for p in found) / (2 * data.batch_size * data.max_length)
            weights += text["vocab_size"] * text["hidden_size"]
            base = GPU_PROCESS_MB if asked.gpu else PROCESS_MB
            base += weights * (4 if source.dtype == "float32" else 2) / 1e6
        return math.ceil(base * asked.growth ** (attempt - 1))

    def runtime(self, attempt: int, cells: Sequence[Cell] = (), *, trials: bool = False) -> int:
        """Minutes of a job: an hour, and twice what a GPU takes for the FLOPs of its training."""
        asked = self.plan.study.resources
        minutes: float = asked.runtime or MINUTES
        if asked.runtime is None and asked.gpu:
            flops = sum(self.flops(cell, trials=trials) or 0.0 for cell in cells)
            minutes += SLACK * flops / (asked.tflops * 1e12) / 60
        return math.ceil(minutes * asked.growth ** (attempt - 1))


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
