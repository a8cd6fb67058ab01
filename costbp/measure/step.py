"""What one step of an estimator costs: counted FLOPs, forward units and peak bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from costbp.estimators.base import Estimator
from costbp.measure.memory import PeakMemory
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


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that ``run()`` dispatches (a product of m x k and k x n counts
    2 m k n; elementwise work is not counted)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.no_grad()
def forward_only(objective: Objective, batch: Batch) -> None:
    """The unit: one forward of one batch, without a graph."""
    objective.value(batch)


def peak_bytes(run: Callable[[], Any], objective: Objective, batches: Sequence[Batch]) -> int:
    """Peak bytes of ``run()`` beyond what is there before it starts."""
    existing = [
        *objective.module.parameters(),
        *objective.module.buffers(),
        objective.theta,
        *(p.grad for p in objective.module.parameters() if p.grad is not None),
        *(tensor for batch in batches for tensor in batch.values()),
    ]
    with PeakMemory(existing) as memory:
        run()
    return memory.peak


def step_cost(
    estimator: Estimator, objective: Objective, batches: Sequence[Batch], key: Key
) -> StepCost:
    """Count one estimate on ``batches``; theta is left as it was.

    Raises:
        ValueError: the forward pass runs no matrix product that could serve as the unit.
    """

    def estimate() -> None:
        estimator.estimate(objective, batches, key)

    forward = [count_flops(lambda b=batch: forward_only(objective, b)) for batch in batches]  # type: ignore[misc]
    if not all(forward):
        raise ValueError("the forward pass runs no matrix product: forward units are undefined")
    return StepCost(
        flops=count_flops(estimate),
        forward_flops=statistics.mean(forward),
        peak_bytes=peak_bytes(estimate, objective, batches),
    )


def median_seconds(run: Callable[[], Any], repeats: int = 7, device: str = "cpu") -> float:
    """Median wall time of ``run()`` after one warm-up, with the device synchronised."""

    def once() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(repeats))
