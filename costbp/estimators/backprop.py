"""Reverse mode. A memory plan may trade activations for recomputation; gradients don't change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from costbp.config.shares import fewest_inputs
from costbp.estimators.base import Estimate, Estimator, Way
from costbp.estimators.memory_plans import Keeping, MemoryPlan, SubLayers, blocks, towers
from costbp.objective import Batch, Key, Objective


@dataclass
class Backprop(Estimator):
    """Backpropagation under a memory plan.

    Cost with a frozen base and adapters: forward 1 + activation gradient 1 = 2 forward units; up
    to two and a third more for what the plan recomputes.
    """

    plan: MemoryPlan
    divisible = True

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        with objective.noise(key), self.plan(objective, batch):
            loss, gradient = objective.gradient(batch)
        return Estimate(gradient, loss, gradient.new_empty(0))

    def ways(self, objective: Objective) -> list[Way]:
        """Instead of its plan: every block kept, the last ones kept, none; then halves of blocks, and
        fewer and fewer inputs of blocks kept."""
        count = len(blocks(objective.module))
        longest = max(map(len, towers(objective.module)))
        plans: list[tuple[str, MemoryPlan]] = [
            (f"{kept} of {count} blocks kept", Keeping(kept)) for kept in range(count, -1, -1)
        ]
        plans += [
            (f"halves of {count} blocks recomputed, {kept} inputs kept", SubLayers(kept))
            for kept in range(longest, fewest_inputs(longest) - 1, -1)
        ]
        return [Way(text, n, replace(self, plan=plan)) for n, (text, plan) in enumerate(plans)]
