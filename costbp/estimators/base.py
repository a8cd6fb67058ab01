"""The protocol: an estimator turns a loss and a batch into a gradient estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from costbp.objective import Batch, Key, Objective


@dataclass(frozen=True)
class Estimate:
    """What a step knows after looking at its batches.

    Attributes:
        gradient: estimate of the gradient, [d]. May be a buffer that the next call overwrites.
        loss: mean loss of the batches at theta, [].
        derivatives: directional derivatives, [K]; empty for reverse mode.
        non_finite: directional derivatives dropped because they were not finite.
    """

    gradient: Tensor
    loss: Tensor
    derivatives: Tensor
    non_finite: int = 0

    @property
    def norm(self) -> float:
        """Euclidean norm of the gradient estimate."""
        return float(self.gradient.norm())


class Estimator(Protocol):
    """A gradient estimator. It sees a module, a callable loss and a vector; never a task."""

    @property
    def batches_per_step(self) -> int:
        """Batches that one estimate looks at."""
        ...

    @property
    def per_batch(self) -> Estimator:
        """The estimator that runs on each batch: itself, or what it averages."""
        ...

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        """Estimate the gradient of the mean loss of ``batches`` (``batches_per_step`` of them).

        ``objective.theta`` is bit-equal before and after; all randomness comes from ``key``.
        """
        ...
