"""What closed forms of a step's cost know of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """What a step adds to a forward pass, in forward units.

    The defaults are the rule of thumb for a frozen base with small adapters: every product has one
    factor that depends on a trained parameter, and what a plan recomputes is a whole forward pass.

    Attributes:
        live: one tangent: products with live factors.
        backward: the backward pass: the same, where attention isn't fused.
        recomputed: what recomputing every block but the last computes a second time.
        halves: what recomputing every block's halves, one after the other, computes again: of the rule
            of thumb's block attention is a third, and runs twice.
        tensors: trainable tensors, whose groups calibration probes.
        blocks: repeated blocks, for locally guessed directions.
        towers: of blocks that are recomputed: how many, and forward units of one; if empty, all the
            ``blocks``, which then are the whole model.
    """

    live: float = 1.0
    backward: float = 1.0
    recomputed: float = 1.0
    halves: float = 4 / 3
    tensors: int = 0
    blocks: int = 1
    towers: tuple[tuple[int, float], ...] = ()

    def dropped(self, inputs: int | None) -> float:
        """What computing inputs of blocks again takes, where so many are kept (None: the fewest)."""
        towers = self.towers or ((self.blocks, 1 / self.blocks),)
        return sum(max(n - (inputs or fewest_inputs(n)), 0) * one for n, one in towers)


RULE_OF_THUMB = Shares()


def fewest_inputs(blocks: int) -> int:
    """The smallest n with n (n + 1) / 2 >= ``blocks``: inputs from which one more forward pass makes the
    others (``SubLayers`` in estimators/memory_plans.py)."""
    return math.ceil((math.sqrt(8 * blocks + 1) - 1) / 2)
