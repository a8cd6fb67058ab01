"""What one step of an estimator costs: counted FLOPs, forward units and peak bytes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from costbp.estimators.base import Estimator
from costbp.measure.meter import Meter
from costbp.objective import Batch, Key, Objective


@dataclass(frozen=True)
class StepCost:
    """Cost of one estimate.

    Attributes:
        flops: floating-point operations of matrix products, counted as they run.
        forward_flops: the same for one no-grad forward of one batch, mean over the step's batches.
        peak_bytes: largest number of bytes alive at once beyond parameters, gradient buffer,
            optimiser state and batch.
    """

    flops: int
    forward_flops: float
    peak_bytes: int

    @property
    def units(self) -> float:
        """Forward units: FLOPs in no-grad forwards of one batch."""
        return self.flops / self.forward_flops


@torch.no_grad()
def forward_only(objective: Objective, batch: Batch) -> None:
    """The unit: one forward of one batch, without a graph."""
    objective.value(batch)


def batch_cost(estimator: Estimator, objective: Objective, batch: Batch, key: Key) -> StepCost:
    """Count one estimate on one batch; theta is left as it was.

    Raises:
        ValueError: the forward pass runs no matrix product that could serve as the unit.
    """
    with Meter() as forward:
        forward_only(objective, batch)
    if not forward.flops:
        raise ValueError("the forward pass runs no matrix product: forward units are undefined")
    with Meter([*objective.existing(), *batch.values()]) as step:
        estimator.estimate(objective, [batch], key)
    return StepCost(step.flops, forward.flops, step.peak)


class CostCounter:
    """Cost of steps, counted once per shape of batch and phase of the estimator, on estimates
    that are thrown away."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = copy.deepcopy(estimator)  # never run itself: it remembers nothing
        self._known: dict[tuple[Any, ...], StepCost] = {}
        self._begun: Estimator | None = None  # one that remembers a first step

    def __call__(self, objective: Objective, batches: Sequence[Batch], key: Key) -> StepCost:
        """Cost of step ``key.step`` on its ``batches``. Inner estimates run one after the other,
        so FLOPs add up; the peak is the largest, with what wrappers hold meanwhile."""
        estimator = self.estimator.per_batch
        costs, flops = [], 0
        for batch, passes in zip(batches, self.estimator.passes(key.step), strict=True):
            shape = tuple(tuple(tensor.shape) for tensor in batch.values())
            known = (shape, estimator.phase(key.step))
            if known not in self._known:
                trial = self._trial(objective, batch, key)
                self._known[known] = batch_cost(trial, objective, batch, key)
            costs.append(self._known[known])
            flops += passes * costs[-1].flops
        held = self.estimator.scratch * objective.theta.nbytes
        return StepCost(
            flops=flops,
            forward_flops=statistics.mean(cost.forward_flops for cost in costs),
            peak_bytes=max(cost.peak_bytes for cost in costs) + held,
        )

    def _trial(self, objective: Objective, batch: Batch, key: Key) -> Estimator:
        """An estimator to count with: fresh for steps like the first, else one that has made it."""
        fresh = copy.deepcopy(self.estimator.per_batch)
        if fresh.phase(key.step) == fresh.phase(0):
            return fresh
        if self._begun is None:
            fresh.estimate(objective, [batch], replace(key, step=0))
            self._begun = fresh
        return copy.deepcopy(self._begun)


def wall_seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of one ``run()``, with the device synchronised before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Median wall time of ``run()`` after one warm-up: seven calls, or as many as fit into a
    second, at least one."""
    run()
    times = [wall_seconds(run, device)]
    while len(times) < 7 and sum(times) < 1:
        times.append(wall_seconds(run, device))
    return statistics.median(times)
