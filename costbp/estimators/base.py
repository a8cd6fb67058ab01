"""The protocol: an estimator turns a loss and a batch into a gradient estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from costbp.objective import Batch, Key, Objective


@dataclass(frozen=True)
class Estimate:
    """What a step knows after looking at its batches.

    Attributes:
        gradient: estimate of the gradient, [d]. May be the objective's buffer, which the next
            estimate overwrites.
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
        """Euclidean norm of the gradient estimate, accumulated in float32 or wider."""
        return float(wide(self.gradient).norm())


class Estimator(ABC):
    """A gradient estimator. It sees a module, a callable loss and a vector; never a task.

    ``estimate`` is all that a new one must define. What an estimator remembers between steps
    (a snapshot, a mask) goes through ``state_dict``, so that a resumed run continues bit-equal.
    """

    @abstractmethod
    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        """Estimate the gradient of the mean loss of ``batches`` (one for each of ``passes``).

        ``objective.theta`` is bit-equal before and after; all randomness comes from ``key``.
        """

    def passes(self, step: int) -> tuple[int, ...]:
        """One entry for each batch that ``step`` looks at: how often ``per_batch`` runs on it."""
        return (1,)

    @property
    def per_batch(self) -> Estimator:
        """The estimator that runs on each batch: itself, or what it wraps."""
        return self

    @property
    def cycle(self) -> int:
        """Steps after which the cost of a step repeats."""
        return 1

    def phase(self, step: int) -> int:
        """Steps of one phase cost the same on batches of one shape."""
        return 0

    @property
    def scratch(self) -> int:
        """Vectors of length d that a wrapper holds while ``per_batch`` runs."""
        return 0

    @property
    def kept(self) -> int:
        """Vectors of length d that a wrapper keeps between steps."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """What it remembers between steps, by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Continue from ``state_dict()``."""


def wide(value: Tensor) -> Tensor:
    """``value`` in float32, or as it is where it is already wider."""
    return value if value.dtype == torch.float64 else value.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which quantities of ``dtype`` are accumulated: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32
