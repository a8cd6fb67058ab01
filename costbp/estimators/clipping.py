"""What may be done to a finished estimate: clipping, and taking its sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from costbp.estimators.base import Estimate, wide
from costbp.estimators.variance import Wrapper
from costbp.objective import Batch, Key, Objective


@dataclass
class Clipped(Wrapper):
    """The inner estimate, clipped by norm, then replaced by its signs.

    Args:
        norm: largest Euclidean norm; a longer estimate is scaled down to it.
        sign: hand out signs (signSGD, Bernstein et al. 2018; of zeroth-order estimates: Liu et
            al. 2019, ZO-signSGD).
    """

    norm: float | None = None
    sign: bool = False

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        estimate = self.inner.estimate(objective, batches, key)
        gradient = estimate.gradient
        if self.norm is not None:
            gradient.mul_((self.norm / wide(gradient).norm()).clamp(max=1))
        if self.sign:
            gradient.sign_()
        return replace(estimate, made=gradient)
