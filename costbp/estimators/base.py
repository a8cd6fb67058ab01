"""The protocol: an estimator turns a loss and a batch into a gradient estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from costbp.objective import Batch, Key, Objective, Piece


class Unmade(Protocol):
    """A gradient that is made where it is needed."""

    def whole(self) -> Tensor:
        """In the objective's buffer, [d]."""

    def by_piece(self) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece of theta with its share, [numel]."""


@dataclass(frozen=True)
class Estimate:
    """What a step knows after looking at its batches.

    Attributes:
        made: estimate of the gradient, [d], or what makes it.
        loss: mean loss of the batches at theta, [].
        derivatives: directional derivatives, [K]; empty for reverse mode.

    Nothing of it has been read from the device: a step synchronises once, in the loop.
    """

    made: Tensor | Unmade
    loss: Tensor
    derivatives: Tensor

    @cached_property
    def gradient(self) -> Tensor:
        """Estimate of the gradient, [d]. May be the objective's buffer, which the next estimate
        overwrites."""
        return self.made if isinstance(self.made, Tensor) else self.made.whole()

    @property
    def figures(self) -> Tensor:
        """Loss, Euclidean norm of the gradient, root mean square of the derivatives (nan without
        any) and how many of them were dropped because they were not finite: [4], float32 or
        wider."""
        dtype = wide_dtype(self.gradient.dtype)
        return self.figures_with(torch.linalg.vector_norm(self.gradient, dtype=dtype))

    def figures_with(self, norm: Tensor) -> Tensor:
        """The same of a gradient whose norm [] is known."""
        size = wide(self.derivatives).square().mean().sqrt()
        dropped = (~torch.isfinite(self.derivatives)).sum()
        return torch.stack([part.to(norm.dtype) for part in (self.loss, norm, size, dropped)])


@dataclass
class Difference(ABC):
    """An oracle that takes finite differences, and how it takes them.

    Attributes:
        eps: its step; None: ``STEP`` until a probe settles another (``estimators/probe.py``).
        batched: whether the perturbed parameter sets of an estimate run as one forward.
        float32: whether losses are computed in float32 on a base that is held in half precision.
    """

    eps: float | None = None
    batched: Literal["auto", "always", "never"] = "auto"
    float32: bool = field(default=False, init=False)

    @property
    def step(self) -> float:
        """The step that is taken."""
        return STEP if self.eps is None else self.eps

    @abstractmethod
    def __call__(
        self, objective: Objective, batch: Batch, directions: Any
    ) -> tuple[Tensor, Tensor]:
        """Loss [] and directional derivatives [K]."""

    @abstractmethod
    def forwards(self, count: int) -> int:
        """Forward passes for ``count`` derivatives."""

    def ways(self, count: int) -> list[tuple[str, int, Any]]:
        """As it is set and, where that may be as one forward, one perturbation after the other: each
        then computes for itself what depends on no trained parameter."""
        if self.batched == "never" or count == 1:
            return [("", 1, self)]
        return [("", 1, self), ("one perturbation at a time", 2, replace(self, batched="never"))]


@dataclass(frozen=True)
class Way:
    """One of several ways to compute the same estimates.

    Attributes:
        text: which one, for people; empty for the way that is set.
        cost: orders them by forward units; equal where those are equal.
        estimator: what computes so.
    """

    text: str
    cost: int
    estimator: Estimator


def halvings(whole: int) -> Iterator[int]:
    """``whole``, half of it, and so on to 1."""
    yield whole
    while whole > 1:
        whole = -(-whole // 2)
        yield whole


STEP = 1e-3  # of a difference in float32 (MeZO, arXiv 2305.17333)


class Estimator(ABC):
    """A gradient estimator. It sees a module, a callable loss and a vector; never a task.

    ``estimate`` is all that a new one must define. What an estimator remembers between steps
    (a snapshot, a mask) goes through ``state_dict``, so that a resumed run continues bit-equal.

    Attributes:
        divisible: whether estimates are the same where the objective computes a batch in parts:
            where they know the batch by its mean loss, gradient and derivatives alone.
        by_piece: whether estimates can be had one piece of theta after the other.
    """

    divisible = by_piece = False

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
    def difference(self) -> Difference | None:
        """The finite difference behind its derivatives, whose step a run settles before it
        starts; None where derivatives are exact."""
        return None

    def ways(self, objective: Objective) -> list[Way]:
        """Ways to compute the same estimates, by rising cost, and of equal cost by falling memory."""
        return [Way("", 0, self)]

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
