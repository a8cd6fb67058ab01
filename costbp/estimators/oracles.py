"""Oracles: the loss at theta and its derivatives along K directions.

An oracle is called as ``oracle(objective, batch, tangents)`` with tangents [K, d] and returns the
loss [] and the derivatives [K], both float32 or wider, and leaves theta bit-equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from costbp.estimators.forward_mode import directional_derivatives
from costbp.objective import Batch, Objective


class Oracle(Protocol):
    """Loss [] and directional derivatives [K] along ``tangents`` [K, d]."""

    def __call__(
        self, objective: Objective, batch: Batch, tangents: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def wide(value: Tensor) -> Tensor:
    """``value`` in float32, or as it is where it is already wider."""
    return value if value.dtype == torch.float64 else value.float()


@dataclass(frozen=True)
class Exact:
    """Forward-mode AD: K tangents ride on one shared primal pass, ``chunk`` of them at a time.

    Floor: 1 + K forward units for a frozen base with adapters, one more primal per extra chunk.
    """

    chunk: int | None = None

    def __call__(
        self, objective: Objective, batch: Batch, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, derivatives = zip(
            *(
                directional_derivatives(lambda t: objective.at(t, batch), objective.theta, part)
                for part in tangents.split(self.chunk or len(tangents))
            ),
            strict=True,
        )
        return wide(losses[0]), wide(torch.cat(derivatives))


@dataclass(frozen=True)
class Central:
    """Central difference (f(theta + eps z) - f(theta - eps z)) / (2 eps) (SPSA, Spall 1992; the
    oracle of MeZO, arXiv 2305.17333). Error eps^2/6 times the third derivative along z, plus
    rounding of about (machine epsilon) |f| / eps. The loss it reports is the mean of the two
    sides. Floor: 2K forward units.
    """

    eps: float

    def __call__(
        self, objective: Objective, batch: Batch, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = torch.stack(
            [
                torch.stack([self._side(objective, batch, side * self.eps, z) for side in (1, -1)])
                for z in tangents
            ]
        )
        return losses.mean(), (losses[:, 0] - losses[:, 1]) / (2 * self.eps)

    @staticmethod
    @torch.no_grad()
    def _side(objective: Objective, batch: Batch, step: float, z: Tensor) -> Tensor:
        with objective.displaced(step * z):
            return wide(objective.value(batch))
