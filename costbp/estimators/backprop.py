"""Reverse mode. A memory plan may trade activations for recomputation; gradients don't change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from costbp.estimators.base import Estimate, Estimator, Way
from costbp.estimators.memory_plans import Keeping, MemoryPlan, blocks
from costbp.objective import Batch, Key, Objective


@dataclass
class Backprop(Estimator):
    """Backpropagation under a memory plan.

    Cost with a frozen base and adapters: forward 1 + activation gradient 1 = 2 forward units; up
    to one more forward for what the plan recomputes.
    """

    plan: MemoryPlan
    divisible = True

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        with objective.noise(key), self.plan(objective, batch):
            loss, gradient = objective.gradient(batch)
        return Estimate(gradient, loss, gradient.new_empty(0))

    def ways(self, objective: Objective) -> list[Way]:
        """Instead of its plan: every block kept, the last ones kept, none."""
        count = len(blocks(objective.module))
        return [
            Way(f"{kept} of {count} blocks kept", count - kept, replace(self, plan=Keeping(kept)))
            for kept in range(count, -1, -1)
        ]
