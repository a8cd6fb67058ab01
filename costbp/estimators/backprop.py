"""Reverse mode. A memory plan may trade activations for recomputation; gradients don't change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costbp.estimators.base import Estimate, Estimator
from costbp.estimators.memory_plans import MemoryPlan
from costbp.objective import Batch, Key, Objective


@dataclass
class Backprop(Estimator):
    """Backpropagation under a memory plan.

    Cost with a frozen base and adapters: forward 1 + activation gradient 1 = 2 forward units; up
    to one more forward for what the plan recomputes.
    """

    plan: MemoryPlan

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        with objective.noise(key), self.plan(objective, batch):
            loss, gradient = objective.gradient(batch)
        return Estimate(gradient, loss, gradient.new_empty(0))
