"""Gradients from directional derivatives: forward-mode AD and zeroth order differ only in the
oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from costbp.estimators.base import Estimate, Estimator
from costbp.estimators.directions import DirectionSource
from costbp.estimators.oracles import Oracle
from costbp.objective import Batch, Key, Objective


@dataclass(frozen=True)
class Projected:
    """g_hat = 1/K sum_k (df/dz_k) z_k over K directions (forward gradient: Baydin et al. 2022,
    arXiv 2202.08587; zeroth order: Nesterov and Spokoiny 2017).

    Unbiased for an exact oracle and directions with E[z z^T] = I. Directions are a function of
    (seed, step, index) alone. A derivative that is not finite is dropped from the sum and counted.
    """

    oracle: Oracle
    source: DirectionSource
    count: int = 1
    batches_per_step: int = 1

    @property
    def per_batch(self) -> Estimator:
        return self

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        tangents = torch.stack(
            [self.source(objective.theta, key.at(index)) for index in range(self.count)]
        )
        with objective.noise(key):
            loss, derivatives = self.oracle(objective, batch, tangents)
        usable = torch.isfinite(derivatives)
        weights = (torch.where(usable, derivatives, 0) / self.count).to(tangents.dtype)
        gradient = tangents.mul_(weights[:, None]).sum(0)
        return Estimate(gradient, loss, derivatives, int((~usable).sum()))
