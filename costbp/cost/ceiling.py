"""Under a memory ceiling a method takes its cheapest arrangement that fits, settled before the run."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from costbp.config.catalog import BudgetEntry
from costbp.config.costs import card_bytes
from costbp.config.entries import Strict, short_hash
from costbp.config.optimizer import OptimizerSpec
from costbp.config.study import COSTS, FORMAT, Plan, RunSpec
from costbp.cost.bench import Bench
from costbp.cost.pairs import on_bench
from costbp.cost.step import forward_only, measure_step
from costbp.estimators.base import Estimator, halvings
from costbp.files import read_cached, write_json
from costbp.meter import Meter
from costbp.models.loss import micro_batches
from costbp.objective import Batch, Objective


class Arrangement(Strict):
    """How an estimate is computed under a ceiling; the smallest way there is, where none fits.

    Attributes:
        way: its place among ``Estimator.ways``.
        rows: examples of a micro-batch; None: the whole batch.
        text: both in words.
        bytes: all alive at a step's peak: weights, theta, gradient, state, and what a step makes.
        d: trainable parameters.
    """

    way: int
    rows: int | None
    text: str
    bytes: int
    ceiling: int
    d: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.ceiling

    @property
    def figures(self) -> dict[str, Any]:
        """What a run's summary says of it."""
        return {"ceiling_bytes": self.ceiling, "arrangement": self.text if self.fits else ""}

    @property
    def message(self) -> str:
        """Why nothing fits."""
        return (
            f"the ceiling is {self.ceiling / 2**20:.2f} MiB, weights included, and the smallest "
            f"arrangement ({self.text}) needs {self.bytes / 2**20:.2f} MiB"
        )

    def arrange(self, estimator: Estimator, objective: Objective) -> Estimator:
        """The estimator that computes so; the objective is set to, too."""
        if self.rows is not None:
            objective.split = partial(micro_batches, rows=self.rows)
        return estimator.ways(objective)[self.way].estimator


def search(
    objective: Objective,
    estimator: Estimator,
    optimizer: OptimizerSpec,
    batch: Batch,
    budget: BudgetEntry,
) -> Arrangement:
    """The arrangement of fewest forward units that keeps a step on ``batch`` under the budget's
    ceiling; of equal ones that with the fewest micro-batches, which cost no unit. Theta is bit-equal
    afterwards.

    That a dearer way and a smaller micro-batch need less memory is taken for granted; that what is
    chosen fits is metered. Statistics of a batch (``BatchNorm``) are those of whole batches alone.
    """
    ways, examples = estimator.ways(objective), len(batch["labels"])
    whole = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in objective.module.modules())
    divisible = estimator.per_batch.divisible and not whole
    sizes = list(halvings(examples)) if divisible else [examples]
    ceiling = _ceiling(budget, objective, batch)

    @cache
    def need(way: int, rows: int) -> int:
        objective.split = partial(_largest, rows=rows) if rows < examples else None
        step = measure_step(objective, ways[way].estimator, optimizer.build(objective.theta), batch)
        return step.weights_bytes + step.state_bytes + step.peak_bytes

    def possible(group: list[int]) -> bool:
        return need(group[-1], sizes[-1]) <= ceiling

    by_cost = itertools.groupby(range(len(ways)), lambda way: ways[way].cost)
    groups = [list(group) for _, group in by_cost]
    try:
        with objective.returning():
            first = 0 if possible(groups[0]) else bisect.bisect_left(groups, True, 1, key=possible)
            way, rows = groups[-1][-1], sizes[-1]
            if first < len(groups):
                pairs = itertools.product(sizes, groups[first])
                rows, way = next((r, w) for r, w in pairs if need(w, r) <= ceiling)
    finally:
        objective.split = None
    parts = -(-examples // rows)
    batches = f"{parts} micro-batches of {rows}" if parts > 1 else f"whole batch of {rows}"
    return Arrangement(
        way=way,
        rows=rows if parts > 1 else None,
        text=", ".join(filter(None, (ways[way].text, batches))),
        bytes=need(way, rows),
        ceiling=ceiling,
        d=objective.d,
    )


def _largest(batch: Batch, rows: int) -> Iterator[tuple[Tensor, Batch]]:
    """The three largest of a batch's parts: after them nothing new is held beside a part."""
    parts = micro_batches(batch, rows)
    yield from sorted(parts, key=lambda part: -sum(t.numel() for t in part[1].values()))[:3]


def _ceiling(budget: BudgetEntry, objective: Objective, batch: Batch) -> int:
    """In bytes. Inference takes what is alive at the peak of a no-grad forward, weights included."""
    limit = budget.peak_memory
    if not isinstance(limit, dict):
        return card_bytes(limit or "")
    kept = [*objective.module.parameters(), *objective.module.buffers()]
    weights = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    with Meter([*objective.existing(), *batch.values()]) as meter:
        forward_only(objective, batch)
    return int(limit["inference"] * (sum(weights.values()) + meter.peak))


def traced_arrangement(plan: Plan, spec: RunSpec) -> Arrangement | None:
    """A run's arrangement by a trace at the task's full length; None without a ceiling, or for a
    model that isn't traced."""

    def traced(bench: Bench) -> Arrangement:
        data = bench.sample(spec.task.batch_size, spec.task.max_length)
        with bench.tracing():
            return search(bench.objective, spec.method.build(), spec.optimizer, data, spec.budget)

    return _cached(plan, spec, lambda: on_bench(plan, *spec.cell[:2], traced))


def metered_arrangement(
    plan: Plan, spec: RunSpec, objective: Objective, batch: Batch
) -> Arrangement | None:
    """A run's arrangement on the largest batch that it can meet; None without a ceiling."""
    given = objective, spec.method.build(), spec.optimizer, batch, spec.budget
    return _cached(plan, spec, lambda: search(*given))


def _cached(
    plan: Plan, spec: RunSpec, find: Callable[[], Arrangement | None]
) -> Arrangement | None:
    if spec.budget.peak_memory is None:
        return None
    entries = [entry.identity() for entry in (spec.model, spec.task, spec.method)]
    limits = [spec.budget.peak_memory, spec.optimizer.model_dump(mode="json")]
    key = short_hash([FORMAT, COSTS, plan.study.device, spec.assets, *entries, *limits])
    model, task, method, _ = spec.cell
    path = plan.study.paths.cache / "cost" / model / task / f"{method}-{key}.ceiling.json"
    found = read_cached(path, Arrangement.model_validate_json)
    if found is None and (found := find()) is not None:
        write_json(path, found.model_dump(mode="json"))
    return found
