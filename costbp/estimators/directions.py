"""Sources of directions z, and K of them as an estimate uses them.

Every source is scaled so that E[(g . z) z'] = g, where z' is the direction's dual: z itself except
for calibrated directions. So the mean over K of (derivative along z) z' is unbiased. Docstrings give
S = E|g_hat|^2 / |g|^2 for one direction and an exact derivative; the mean of K independent ones has
1 + (S - 1) / K. ``theory/variance.py`` holds the formulas.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from costbp.errors import UserError
from costbp.estimators.base import wide, wide_dtype
from costbp.objective import Key, Objective, Piece

Part = Callable[[int, Piece], Tensor]


@dataclass
class Directions:
    """K directions, drawn again from their key, one piece of a parameter at a time, whenever asked for.

    Attributes:
        part: ``part(k, piece)`` is direction k on a piece: [numel], a new tensor in float32 or wider,
            so that a draw doesn't depend on the model's dtype.
        dual: the same for what the derivative along k multiplies in the estimate.
        rounded: whether derivatives are along tangents, in theta's dtype.
    """

    objective: Objective
    count: int
    part: Part
    dual: Part | None = None
    rounded: bool = field(default=False, init=False)

    @cached_property
    def dense(self) -> Tensor:
        """All directions, [K, d], in theta's dtype."""
        return self.tangents(range(self.count))

    def tangents(self, chosen: range) -> Tensor:
        """Some directions, [chosen, d], in theta's dtype: what forward-mode AD needs."""
        rows = self.objective.theta.new_empty(len(chosen), self.objective.d)
        for piece in pieces(self.objective):
            for row, k in enumerate(chosen):
                rows[row, piece.entries] = self.part(k, piece)
        self.rounded = True
        return rows

    def combine(self, weights: Tensor) -> Tensor:
        """sum_k weights_k z'_k [d] in the objective's buffer, summed in float32 or wider."""
        return Combination(self, weights).whole()

    def some(self, first: int, count: int) -> Directions:
        """``count`` of the directions, from ``first`` on."""
        return Directions(self.objective, count, lambda k, piece: self.part(first + k, piece))

    def row(self, k: int) -> Tensor:
        """Direction k whole, [d], in float32 or wider: drawn again, or kept where all K are few."""
        dtype = self.objective.theta.dtype
        if dtype == wide_dtype(dtype) and self.count * self.objective.d <= KEPT:
            return self.dense[k]
        return torch.cat([self.part(k, piece) for piece in pieces(self.objective)])


KEPT = 2**22  # numbers of directions that are kept instead of drawn again


def pieces(objective: Objective) -> Iterator[Piece]:
    """All of theta, one piece after the other."""
    return chain.from_iterable(objective.pieces.values())


@dataclass(frozen=True)
class Combination:
    """sum_k weights_k z'_k, summed in float32 or wider where it is asked for; weights [K]."""

    directions: Directions
    weights: Tensor

    def whole(self) -> Tensor:
        """In the objective's buffer, [d]."""
        buffer = self.directions.objective.buffer
        if self._kept:
            return buffer.copy_(self._sum())
        for piece, gradient in self.by_piece():
            buffer[piece.entries] = gradient
        return buffer

    def by_piece(self) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its share, [numel], in theta's dtype."""
        for piece in pieces(self.directions.objective):
            yield piece, self._sum(piece).to(self.directions.objective.theta.dtype)

    @property
    def _kept(self) -> bool:
        return self.directions.dual is None and "dense" in vars(self.directions)

    def _sum(self, piece: Piece | None = None) -> Tensor:
        total = self._term(0, piece)
        for k in range(1, len(self.weights)):
            total.add_(self._term(k, piece))
        return total

    def _term(self, k: int, piece: Piece | None) -> Tensor:
        """Of a direction as it was used for the derivative."""
        drawn, weight = self.directions, self.weights[k]
        if piece is None or self._kept:
            return wide(drawn.dense[k, slice(None) if piece is None else piece.entries]) * weight
        row = (drawn.dual or drawn.part)(k, piece)
        if drawn.dual is None and drawn.rounded:
            row = wide(row.to(drawn.objective.theta.dtype))
        return row.mul_(weight)


class Source(ABC):
    """Where directions come from. What a source remembers between steps is its state."""

    @abstractmethod
    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        """``count`` directions, a function of the key (and the source's state) alone."""

    def update(self, objective: Objective, key: Key, probe: Probe) -> None:  # noqa: B027
        """Called before the draw of each estimate. ``probe(directions)`` measures derivatives
        [K] along directions, at their full cost."""

    def caution(self, objective: Objective) -> str:
        """What a reader of a run on this objective should know of the directions; mostly nothing."""
        return ""

    def typical(self, objective: Objective, key: Key, count: int) -> Directions:
        """``count`` directions of the kind that is drawn first, with no derivative measured and
        nothing remembered: what a step of a difference is settled on."""
        return self.draw(objective, key, count)

    @property
    def cycle(self) -> int:
        """Steps after which the cost of a draw repeats."""
        return 1

    def phase(self, step: int) -> int:
        """Steps of one phase cost the same."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Continue from ``state_dict()``."""


Probe = Callable[[Directions], Tensor]
Draw = Callable[[int, torch.Generator, torch.device, torch.dtype], Tensor]


def normal(n: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """n independent N(0, 1)."""
    return torch.randn(n, generator=generator, device=device).to(dtype)


def signs(n: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """n independent +1 or -1."""
    return torch.randint(0, 2, (n,), generator=generator, device=device).to(dtype).mul_(2).sub_(1)


def independent(objective: Objective, key: Key, entries: Draw = normal) -> Part:
    """Directions of independent entries; each piece has a key of its own, so that it can be drawn
    without the others."""
    device, dtype = objective.theta.device, wide_dtype(objective.theta.dtype)

    def part(k: int, piece: Piece) -> Tensor:
        own = key.at(k)
        for place in piece.place:
            own = own.at(place)
        return entries(piece.size, own.generator(device), device, dtype)

    return part


class Gaussian(Source):
    """z ~ N(0, I). S = d + 2."""

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        return Directions(objective, count, independent(objective, key))


class Rademacher(Source):
    """Independent signs (SPSA, Spall 1992). S = d."""

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        return Directions(objective, count, independent(objective, key, signs))


class Sphere(Source):
    """Uniform on the sphere of radius sqrt(d). S = d."""

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        part = independent(objective, key)
        scales = []
        for k in range(count):
            squares = [part(k, piece).square().sum() for piece in pieces(objective)]
            scales.append((objective.d / torch.stack(squares).sum()).sqrt())
        return Directions(objective, count, lambda k, piece: part(k, piece).mul_(scales[k]))


class Orthogonal(Source):
    """K orthogonal directions of length sqrt(d), uniform over frames (QR of a Gaussian block).
    S = d for one; together E|g_hat|^2 = (d / K) |g|^2, and K = d gives the gradient exactly.
    Holds K x d numbers.

    Raises:
        UserError: K > d.
    """

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        _at_most_d(count, objective, "orthogonal")
        block = Directions(objective, count, independent(objective, key))
        frame, corner = torch.linalg.qr(torch.stack([block.row(k) for k in range(count)]).T)
        # QR fixes the signs of R's diagonal arbitrarily; undoing that makes the frame uniform
        rows = (frame * corner.diagonal().sign() * math.sqrt(objective.d)).T
        return Directions(objective, count, lambda k, piece: rows[k, piece.entries].clone())


class Coordinate(Source):
    """sqrt(d) e_i for K distinct i. S = d for one; together E|g_hat|^2 = (d / K) |g|^2, and K = d
    gives the gradient exactly.

    Raises:
        UserError: K > d.
    """

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        _at_most_d(count, objective, "coordinate")
        chosen = random.Random(key.number).sample(range(objective.d), count)
        theta, scale = objective.theta, math.sqrt(objective.d)

        def part(k: int, piece: Piece) -> Tensor:
            z = theta.new_zeros(piece.size, dtype=wide_dtype(theta.dtype))
            if piece.entries.start <= chosen[k] < piece.entries.stop:
                z[chosen[k] - piece.entries.start] = scale
            return z

        return Directions(objective, count, part)


def _at_most_d(count: int, objective: Objective, kind: str) -> None:
    if count > objective.d:
        raise UserError(
            f"directions.count = {count}: {kind} directions need count <= d, and this model "
            f"trains d = {objective.d} parameters"
        )


PLAIN: dict[str, type[Source]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthogonal": Orthogonal,
    "coordinate": Coordinate,
}


@dataclass
class Sparse(Source):
    """Gaussian on the ``fraction`` of largest magnitude of each trainable tensor, zero elsewhere;
    chosen anew every ``refresh`` steps (Sparse-MeZO, arXiv 2402.15751, keeps the smallest; the
    study the largest). Ties are kept, so a tensor of zeros, such as LoRA's B at the start, is kept
    whole.

    Unbiased for the gradient restricted to the mask. S = p + 2 of that, with p entries kept.
    """

    fraction: float
    refresh: int
    mask: Tensor | None = field(default=None, init=False)
    chosen_at: int = field(default=-1, init=False)

    def update(self, objective: Objective, key: Key, probe: Probe) -> None:
        if self.mask is not None and (key.step % self.refresh or key.step == self.chosen_at):
            return
        self.chosen_at = key.step
        self.mask = torch.empty(objective.d, dtype=torch.bool, device=objective.theta.device)
        for start, stop, _ in objective.slices.values():
            size = objective.theta[start:stop].abs()
            kept = max(1, round(self.fraction * len(size)))
            self.mask[start:stop] = size >= size.kthvalue(len(size) - kept + 1).values

    def typical(self, objective: Objective, key: Key, count: int) -> Directions:
        fresh = Sparse(self.fraction, self.refresh)
        fresh.update(objective, key, lambda directions: directions.dense)
        return fresh.draw(objective, key, count)

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        part, mask = independent(objective, key), self.mask
        assert mask is not None
        return Directions(objective, count, lambda k, p: part(k, p).mul_(mask[p.entries]))

    def state_dict(self) -> dict[str, Tensor]:
        if self.mask is None:
            return {}
        return {"mask": self.mask, "chosen_at": torch.tensor(self.chosen_at)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.mask, self.chosen_at = state["mask"], int(state["chosen_at"])


@dataclass
class LowRank(Source):
    """Z = U V^T / sqrt(rank) on every matrix m x n, U and V Gaussian, V kept for ``refresh`` steps
    (LOZO, arXiv 2410.07698). Vectors, and matrices with a side of at most ``rank``, get Gaussian
    entries: there low rank means nothing.

    S = d + 2 + sum over matrices of (2 (m + n + 1) / rank) |G|^2 / |g|^2 (our derivation).
    """

    rank: int
    refresh: int = 1

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        plain = independent(objective, key)
        lazy = Key(key.seed, key.step - key.step % self.refresh, (*key.path, -2))
        device, dtype = objective.theta.device, wide_dtype(objective.theta.dtype)

        def part(k: int, piece: Piece) -> Tensor:
            size = matrix(objective.slices[piece.name][2])
            if min(size) <= self.rank:
                return plain(k, piece)
            left, right = (
                normal(
                    side * self.rank, at.at(k).at(piece.place[0]).generator(device), device, dtype
                )
                for side, at in zip(size, (key, lazy), strict=True)
            )
            product = left.view(-1, self.rank)[piece.rows] @ right.view(self.rank, -1)
            return product.view(-1).div_(math.sqrt(self.rank))

        return Directions(objective, count, part)

    def caution(self, objective: Objective) -> str:
        sides = [min(matrix(shape)) for _, _, shape in objective.slices.values()]
        if max(sides) > self.rank:
            return ""
        return (
            f"no trained matrix has a smaller side above the directions' rank of {self.rank}, so all "
            "directions are Gaussian ones: this is plain zeroth order"
        )


def matrix(shape: torch.Size) -> tuple[int, int]:
    """A parameter's shape as that of a matrix; a vector is a single row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
