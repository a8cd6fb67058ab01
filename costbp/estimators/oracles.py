"""Oracles: the loss at theta and its derivatives along K directions.

An oracle is called as ``oracle(objective, batch, directions)`` and returns the loss [] and the
derivatives [K], both float32 or wider, and leaves theta bit-equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from costbp.estimators.base import Difference, halvings, wide, wide_dtype
from costbp.estimators.directions import Directions
from costbp.estimators.forward_mode import directional_derivatives
from costbp.estimators.precision import computing_in
from costbp.objective import Batch, Objective

Batched = Literal["auto", "always", "never"]

SMALL = 64  # positions (tokens of a batch) up to which a batched forward beats a loop on the CPU
FEW = 2**16  # trainable parameters of which a copy is never worth a thought
SHARE = 8  # of a wide activation's numbers, that d may be for theta to be moved
ROOM = 2**28  # bytes of perturbed parameter sets evaluated at once


class Oracle(Protocol):
    """Loss [] and directional derivatives [K]."""

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]: ...

    def ways(self, count: int) -> list[tuple[str, int, Any]]:
        """Oracles that measure the same ``count`` derivatives, each with its name and cost (see
        ``Estimator.ways``)."""
        ...


@dataclass(frozen=True)
class Exact:
    """Forward-mode AD: K tangents ride on one shared primal pass, ``chunk`` of them at a time.

    Floor: 1 + K forward units for a frozen base with adapters, one more primal per extra chunk. Where
    theta is large a parameter's tangent exists one operator at a time, else in [K, d].
    """

    chunk: int | None = None

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        count = directions.count
        chunk = min(self.chunk or count, count)
        found = []
        for first in range(0, count, chunk):
            chosen = range(first, min(first + chunk, count))
            along: Tensor | Directions
            if objective.large:
                along = directions.some(first, len(chosen))
                directions.rounded = True
            else:
                along = directions.dense if chunk == count else directions.tangents(chosen)
            found.append(directional_derivatives(objective, batch, along))
        losses, slopes = zip(*found, strict=True)
        return wide(losses[0]), wide(torch.cat(slopes))

    def ways(self, count: int) -> list[tuple[str, int, Exact]]:
        """All at once, half as many at a time, and so on; each chunk takes a primal pass."""
        return [("", 1, Exact())] + [
            (f"{chunk} of {count} directions at a time", -(-count // chunk), Exact(chunk))
            for chunk in halvings(count)
            if chunk < count
        ]


@torch.no_grad()
def losses_at(
    objective: Objective, batch: Batch, directions: Directions, steps: Sequence[float], how: Batched
) -> Tensor:
    """Losses at theta + step * z_k for each step and k, [steps, K], float32 or wider.

    One after the other: where theta is small against the activations (adapters), it moves there and
    comes back from a copy; where it isn't, perturbed parameters exist one operator at a time, which
    costs Python in every operator and no second theta. Batched, all sets run as one forward by
    vmap: K times its activations, and much faster where a forward is too small to fill the machine.
    ``auto`` batches small inputs, where there are several sets and theta isn't large. All three give
    the same numbers but for the order of sums inside products.
    """
    few = directions.count > 1 and positions(batch) <= SMALL and not objective.large
    if how == "always" or (how == "auto" and few):
        return _batched(objective, batch, directions, steps)
    if objective.d <= FEW or objective.d <= positions(batch) * objective.widest / SHARE:
        return _moving(objective, batch, directions, steps)
    rows = [
        [_one(objective, batch, directions, k, step) for k in range(directions.count)]
        for step in steps
    ]
    return torch.stack([torch.stack(row) for row in rows])


def plain_loss(objective: Objective, batch: Batch) -> Tensor:
    """Loss [] at theta without a graph, float32 or wider."""
    with torch.no_grad():
        return wide(objective.value(batch))


def _one(objective: Objective, batch: Batch, directions: Directions, k: int, step: float) -> Tensor:
    with objective.perturbed(lambda piece: directions.part(k, piece).mul_(step)):
        return wide(objective.value(batch))


def _moving(
    objective: Objective, batch: Batch, directions: Directions, steps: Sequence[float]
) -> Tensor:
    columns = []
    with objective.returning() as home:
        for k in range(directions.count):
            z = directions.row(k)
            losses = []
            for step in steps:
                _move(objective.theta, home, z, step)
                losses.append(wide(objective.value(batch)))
            columns.append(torch.stack(losses))
    return torch.stack(columns, 1)


def _move(theta: Tensor, home: Tensor, z: Tensor, step: float) -> None:
    """theta = home + step z, rounded once in its own dtype."""
    if theta.dtype == z.dtype:
        torch.mul(z, step, out=theta).add_(home)
    else:
        theta.copy_((z * step).add_(home))


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
    return math.prod(first.shape[:-1]) if first.is_floating_point() else first.numel()


@dataclass
class Central(Difference):
    """Central difference (f(theta + eps z) - f(theta - eps z)) / (2 eps) (SPSA, Spall 1992; the
    oracle of MeZO, arXiv 2305.17333). Error eps^2/6 times the third derivative along z, plus
    rounding of about (machine epsilon) |f| / eps. The loss it reports is the mean of the two
    sides. Floor: 2K forward units.
    """

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        eps = self.step
        with computing_in(self):
            up, down = losses_at(objective, batch, directions, (eps, -eps), self.batched)
        return (up + down).mean() / 2, (up - down) / (2 * eps)

    def forwards(self, count: int) -> int:
        return 2 * count


@dataclass
class OneSided(Difference):
    """Forward difference (f(theta + eps z) - f(theta)) / eps with one base loss for all K. Error
    eps/2 times the second derivative along z, plus rounding as ``Central``'s, twice. Floor: 1 + K
    forward units.
    """

    def __call__(
        self, objective: Objective, batch: Batch, directions: Directions
    ) -> tuple[Tensor, Tensor]:
        with computing_in(self):
            base = plain_loss(objective, batch)
            (up,) = losses_at(objective, batch, directions, (self.step,), self.batched)
        return base, (up - base) / self.step

    def forwards(self, count: int) -> int:
        return 1 + count
