"""Wrappers that lower the variance of any estimator, backpropagation included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from costbp.estimators.base import Difference, Estimate, Estimator, Way, wide_dtype
from costbp.objective import Batch, Key, Objective


@dataclass
class Wrapper(Estimator):
    """An estimator around another; what it doesn't define, the inner one does."""

    inner: Estimator

    @property
    def per_batch(self) -> Estimator:
        return self.inner.per_batch

    @property
    def cycle(self) -> int:
        return self.inner.cycle

    def passes(self, step: int) -> tuple[int, ...]:
        return self.inner.passes(step)

    def phase(self, step: int) -> int:
        return self.inner.phase(step)

    @property
    def difference(self) -> Difference | None:
        return self.inner.difference

    def ways(self, objective: Objective) -> list[Way]:
        """Those of the inner estimator."""
        ways = self.inner.ways(objective)
        return [replace(way, estimator=replace(self, inner=way.estimator)) for way in ways]

    @property
    def scratch(self) -> int:
        return self.inner.scratch

    @property
    def kept(self) -> int:
        return self.inner.kept

    def state_dict(self) -> dict[str, Tensor]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.inner.load_state_dict(state)


@dataclass
class Accumulate(Wrapper):
    """Mean of the inner estimates of n micro-batches: one optimiser step on n times the data, at
    n times the cost and the memory of one. Summed in float32 or wider."""

    micro_batches: int

    def passes(self, step: int) -> tuple[int, ...]:
        return self.inner.passes(step) * self.micro_batches

    @property
    def scratch(self) -> int:
        return 1 + self.inner.scratch

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        share = len(self.inner.passes(key.step))
        return mean_estimate(
            self.inner,
            objective,
            [batches[i * share : (i + 1) * share] for i in range(self.micro_batches)],
            key,
        )


def mean_estimate(
    inner: Estimator, objective: Objective, parts: Sequence[Sequence[Batch]], key: Key
) -> Estimate:
    """Mean of one estimate of ``inner`` for each part, each with a sub-key of its own."""
    theta = objective.theta
    total = torch.zeros_like(theta, dtype=wide_dtype(theta.dtype))
    losses, derivatives = [], []
    for index, part in enumerate(parts):
        estimate = inner.estimate(objective, part, key.at(index))
        total += estimate.gradient
        losses.append(estimate.loss)
        derivatives.append(estimate.derivatives)
        del estimate  # with its directions, before the next
    gradient = objective.buffer.copy_(total.div_(len(parts)))
    return Estimate(gradient, torch.stack(losses).mean(), torch.cat(derivatives))


@dataclass
class SVRG(Wrapper):
    """Stochastic variance reduction (Johnson and Zhang 2013; with a subsampled snapshot gradient
    Lei and Jordan 2017; zeroth order Liu et al. 2018).

    Every ``period`` steps theta is remembered as w_s, with mu, the mean inner estimate over
    ``snapshot_batches`` batches; that step uses mu. The steps between use
    g(w; b) - g(w_s; b) + mu on one batch b, both estimates with the same directions and masks: two
    inner estimates a step. At w = w_s the difference is exactly zero. mu is as noisy as the inner
    estimator leaves it: with one direction a batch the reduction is that of the data's noise, not
    of the directions'.
    """

    period: int
    snapshot_batches: int
    snapshot: Tensor | None = field(default=None, init=False)
    mu: Tensor | None = field(default=None, init=False)

    def _renews(self, step: int) -> bool:
        return step % self.period == 0

    def passes(self, step: int) -> tuple[int, ...]:
        if self._renews(step):
            return self.inner.passes(step) * self.snapshot_batches
        return tuple(2 * count for count in self.inner.passes(step))

    @property
    def cycle(self) -> int:
        return self.period * self.inner.cycle

    @property
    def scratch(self) -> int:
        return 2 + self.inner.scratch

    @property
    def kept(self) -> int:
        return 2 + self.inner.kept

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        if self._renews(key.step):
            share = len(self.inner.passes(key.step))
            parts = [batches[i : i + share] for i in range(0, len(batches), share)]
            estimate = mean_estimate(self.inner, objective, parts, key)
            self.snapshot, self.mu = objective.theta.clone(), estimate.gradient.clone()
            return estimate
        assert self.snapshot is not None and self.mu is not None, "no snapshot before this step"
        here = self.inner.estimate(objective, batches, key)  # first: masks follow theta, not w_s
        gradient = here.gradient.clone()
        here = replace(here, made=gradient)
        with objective.returning():
            objective.theta.copy_(self.snapshot)
            gradient.sub_(self.inner.estimate(objective, batches, key).gradient)
        return replace(here, made=objective.buffer.copy_(gradient.add_(self.mu)))

    def state_dict(self) -> dict[str, Tensor]:
        own = {"snapshot": self.snapshot, "mu": self.mu}
        kept = {name: value for name, value in own.items() if value is not None}
        return {**kept, **{f"inner.{k}": v for k, v in self.inner.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.snapshot, self.mu = state.get("snapshot"), state.get("mu")
        self.inner.load_state_dict(
            {k.removeprefix("inner."): v for k, v in state.items() if k.startswith("inner.")}
        )
