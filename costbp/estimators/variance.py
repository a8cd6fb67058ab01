"""Wrappers that lower the variance of any estimator, backpropagation included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from costbp.estimators.base import Estimate, Estimator
from costbp.objective import Batch, Key, Objective


@dataclass(frozen=True)
class Accumulate:
    """Mean of the inner estimates of n micro-batches: one optimiser step on n times the data, at
    n times the cost and the memory of one."""

    inner: Estimator
    micro_batches: int

    @property
    def batches_per_step(self) -> int:
        return self.micro_batches * self.inner.batches_per_step

    @property
    def per_batch(self) -> Estimator:
        return self.inner.per_batch

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        total = torch.zeros_like(objective.theta)
        losses, derivatives, non_finite = [], [], 0
        share = self.inner.batches_per_step
        for index in range(self.micro_batches):
            part = batches[index * share : (index + 1) * share]
            inner = self.inner.estimate(objective, part, key.at(index))
            total += inner.gradient
            losses.append(inner.loss)
            derivatives.append(inner.derivatives)
            non_finite += inner.non_finite
        return Estimate(
            total.div_(self.micro_batches),
            torch.stack(losses).mean(),
            torch.cat(derivatives),
            non_finite,
        )
