"""What closed forms of a step's cost know of a model."""

from __future__ import annotations

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
        tensors: trainable tensors, whose groups calibration probes.
        blocks: repeated blocks, for locally guessed directions.
    """

    live: float = 1.0
    backward: float = 1.0
    recomputed: float = 1.0
    tensors: int = 0
    blocks: int = 1


RULE_OF_THUMB = Shares()
