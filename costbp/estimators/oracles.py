"""Oracles: the loss at theta and its derivatives along K directions.

An oracle is called as ``oracle(objective, batch, directions)`` and returns the loss [] and the
derivatives [K], both float32 or wider, and leaves theta bit-equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from costbp.estimators.base import wide, wide_dtype
from costbp.estimators.directions import Directions
from costbp.estimators.forward_mode import directional_derivatives
from costbp.objective import Batch, Objective

Batched = Literal["auto", "always", "never"]

SMALL = 64  # positions (tokens of a batch) up to which a batched forward beats a loop on the CPU
ROOM = 2**28  # bytes of perturbed parameter sets evaluated at once


class Oracle(Protocol):
    """Loss [] and directional derivatives [K]."""

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Exact:
    """Forward-mode AD: K tangents ride on one shared primal pass, ``chunk`` of them at a time.

    Floor: 1 + K forward units for a frozen base with adapters, one more primal per extra chunk.
    """

    chunk: int | None = None

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        tangents = directions.dense
        losses, derivatives = zip(
            *(
                directional_derivatives(objective, batch, part)
                for part in tangents.split(self.chunk or len(tangents))
            ),
            strict=True,
        )
        return wide(losses[0]), wide(torch.cat(derivatives))


@torch.no_grad()
def losses_at(
    objective: Objective, batch: Batch, directions: Directions, steps: Sequence[float], how: Batched
) -> Tensor:
    """Losses at theta + step * z_k for each step and k, [steps, K], float32 or wider.

    One after the other, the perturbed parameters exist one operator at a time. Batched, all sets
    run as one forward by vmap: K times its activations, and much faster where a forward is too
    small to fill the machine. ``auto`` batches small inputs, where there are several sets.
    """
    if how == "always" or (how == "auto" and directions.count > 1 and positions(batch) <= SMALL):
        return _batched(objective, batch, directions, steps)
    rows = [
        [_one(objective, batch, directions, k, step) for k in range(directions.count)]
        for step in steps
    ]
    return torch.stack([torch.stack(row) for row in rows])


def _one(objective: Objective, batch: Batch, directions: Directions, k: int, step: float) -> Tensor:
    with objective.perturbed(lambda name: directions.part(k, name).mul_(step)):
        return wide(objective.value(batch))


def _batched(
    objective: Objective, batch: Batch, directions: Directions, steps: Sequence[float]
) -> Tensor:
    dtype = wide_dtype(objective.theta.dtype)
    loss = vmap(lambda theta: objective.at(theta, batch), randomness="same")
    share = max(1, ROOM // (objective.d * dtype.itemsize))
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for step in steps:
            parts = []
            for z in directions.dense.split(share):
                sets = torch.add(objective.theta, z.to(dtype), alpha=step)
                parts.append(wide(loss(sets.to(objective.theta.dtype))))
            rows.append(torch.cat(parts))
    return torch.stack(rows)


def positions(batch: Batch) -> int:
    """Rows that a linear layer sees: tokens, or examples where the input is one feature vector."""
    first = next(iter(batch.values()))
    return first.numel() if not first.is_floating_point() else len(first)


@dataclass(frozen=True)
class Central:
    """Central difference (f(theta + eps z) - f(theta - eps z)) / (2 eps) (SPSA, Spall 1992; the
    oracle of MeZO, arXiv 2305.17333). Error eps^2/6 times the third derivative along z, plus
    rounding of about (machine epsilon) |f| / eps. The loss it reports is the mean of the two
    sides. Floor: 2K forward units.
    """

    eps: float
    batched: Batched = "auto"

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        steps = (self.eps, -self.eps)
        up, down = losses_at(objective, batch, directions, steps, self.batched)
        return (up + down).mean() / 2, (up - down) / (2 * self.eps)


@dataclass(frozen=True)
class OneSided:
    """Forward difference (f(theta + eps z) - f(theta)) / eps with one base loss for all K. Error
    eps/2 times the second derivative along z, plus rounding as ``Central``'s, twice. Floor: 1 + K
    forward units.
    """

    eps: float
    batched: Batched = "auto"

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            base = wide(objective.value(batch))
        (up,) = losses_at(objective, batch, directions, (self.eps,), self.batched)
        return base, (up - base) / self.eps
