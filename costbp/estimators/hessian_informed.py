"""Zeroth order scaled by an estimate of the Hessian's diagonal (HiZOO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from costbp.estimators.base import Difference, Estimate, Estimator, wide_dtype
from costbp.estimators.directions import Directions, Part, independent, pieces
from costbp.estimators.oracles import Central, losses_at, plain_loss
from costbp.estimators.precision import computing_in
from costbp.objective import Batch, Key, Objective, Piece


@dataclass
class HessianInformed(Estimator):
    """z = Sigma^(1/2) u with u ~ N(0, I), where Sigma^-1 follows the diagonal of the Hessian
    (Zhao et al., HiZOO, arXiv 2402.15173, Algorithm 1). With f0 = f(theta), f+- = f(theta +- eps z):

        g_hat = (f+ - f-) / (2 eps) z,  E[g_hat] = Sigma g: a preconditioned gradient
        Sigma^-1 <- (1 - a) Sigma^-1 + a |(f+ + f- - 2 f0) / (2 eps^2)| u^2 / Sigma  (diagonal)

    Three forward units. Ours: Sigma is kept for the flat vector, is applied from the next step on,
    and its entries are held within ``limit`` and 1/``limit``. It is a vector [d] of state.

    Args:
        how: the central difference whose step and precision are used.
        smoothing: a, the share of the newest curvature.
        limit: largest entry of Sigma and of its inverse.
    """

    how: Central
    smoothing: float
    limit: float = 1e3
    inverse: Tensor | None = field(default=None, init=False)
    divisible = True  # curvature, too, is of the mean loss

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        theta = objective.theta
        if self.inverse is None:
            self.inverse = torch.ones_like(theta, dtype=wide_dtype(theta.dtype))
        noise, inverse = independent(objective, key), self.inverse

        def scaled(k: int, piece: Piece) -> Tensor:
            return noise(k, piece).mul_(inverse[piece.entries].rsqrt())

        directions, eps = Directions(objective, 1, scaled), self.how.step
        with objective.noise(key), computing_in(self.how):
            base = plain_loss(objective, batch)
            up, down = losses_at(objective, batch, directions, (eps, -eps), "never").flatten()
        slope = (up - down) / (2 * eps)
        usable = torch.isfinite(slope)
        gradient = directions.combine(torch.where(usable, slope, 0).reshape(1))
        self._learn(objective, noise, usable, (up + down - 2 * base) / (2 * eps**2))
        return Estimate(gradient, base, slope.reshape(1))

    def _learn(self, objective: Objective, noise: Part, usable: Tensor, curvature: Tensor) -> None:
        assert self.inverse is not None
        for piece in pieces(objective):
            old = self.inverse[piece.entries]
            seen = noise(0, piece).square_().mul_(old).mul_(curvature.abs())
            seen = torch.where(usable, seen, old)
            old.lerp_(seen, self.smoothing).clamp_(1 / self.limit, self.limit)

    @property
    def difference(self) -> Difference:
        return self.how

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.inverse is None else {"inverse": self.inverse}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inverse = state.get("inverse")
