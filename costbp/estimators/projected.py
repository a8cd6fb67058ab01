"""Gradients from directional derivatives: forward-mode AD and zeroth order differ only in the
oracle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from costbp.errors import UserError
from costbp.estimators.base import Difference, Estimate, Estimator, Way
from costbp.estimators.directions import Combination, Directions, Source
from costbp.estimators.oracles import Oracle
from costbp.objective import Batch, Key, Objective, cut


@dataclass
class Projected(Estimator):
    """g_hat = 1/K sum_k (df/dz_k) z_k over K directions (forward gradient: Baydin et al. 2022,
    arXiv 2202.08587; zeroth order: Nesterov and Spokoiny 2017).

    Unbiased for an exact oracle and any source. Directions are a function of (seed, step, path)
    alone. A derivative that is not finite is dropped from the sum and counted.

    Args:
        oracle: measures derivatives.
        source: draws directions.
        count: K.
        scale: ``unbiased``; ``spread`` divides by the standard deviation of the K derivatives
            (the losses' spread over eps), which makes the step size follow it (FZOO, ICLR 2026);
            ``legacy`` multiplies by the difference's step, as the study's ZO code does.
        limit: largest absolute derivative that is used; larger ones are clipped.
        groups: parts of the batch, each with K directions of its own: the estimate is the mean over
            parts, at the forwards of one (Flipout, Wen et al. 2018, arXiv 1803.04386; with
            ``spread``, GRZO, arXiv 2606.02857). What it gains: ``theory/variance.py``.
    """

    oracle: Oracle
    source: Source
    count: int = 1
    scale: Literal["unbiased", "spread", "legacy"] = "unbiased"
    limit: float | None = None
    groups: int | Literal["examples"] = 1
    divisible = True  # directions that learn from a batch learn from derivatives of its mean loss
    by_piece = True

    @property
    def difference(self) -> Difference | None:
        return self.oracle if isinstance(self.oracle, Difference) else None

    @property
    def cycle(self) -> int:
        return self.source.cycle

    def phase(self, step: int) -> int:
        return self.source.phase(step)

    def ways(self, objective: Objective) -> list[Way]:
        """Those of its oracle, for the directions of a step or of a calibration."""
        ways = self.oracle.ways(max(self.count, getattr(self.source, "candidates", 1)))
        return [Way(text, cost, replace(self, oracle=oracle)) for text, cost, oracle in ways]

    def state_dict(self) -> dict[str, Tensor]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.source.load_state_dict(state)

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        parts = split(batch, self.groups)

        def probe(directions: Directions) -> Tensor:
            return self.oracle(objective, batch, directions)[1]

        with objective.noise(key):
            self.source.update(objective, key, probe)
        directions = self.source.draw(objective, key, self.count * len(parts))
        losses, slopes = [], []
        for index, (share, part) in enumerate(parts):
            own = directions if len(parts) == 1 else directions.some(index * self.count, self.count)
            with objective.noise(key if len(parts) == 1 else key.at(index)):
                loss, slope = self.oracle(objective, part, own)
            losses.append(loss * share)
            slopes.append(slope)
        derivatives = torch.cat(slopes)
        usable = torch.isfinite(derivatives)
        weights = torch.where(usable, derivatives, 0)
        if self.limit is not None:
            weights = weights.clamp(-self.limit, self.limit)
        weights = weights * (self._factor(derivatives, usable) / self.count)
        shared = zip(weights.split(self.count), parts, strict=True)
        weights = torch.cat([weight * share for weight, (share, _) in shared])
        return Estimate(Combination(directions, weights), torch.stack(losses).sum(), derivatives)

    def _factor(self, derivatives: Tensor, usable: Tensor) -> float | Tensor:
        if self.scale == "legacy":
            assert self.difference is not None, "configuration refuses it for exact derivatives"
            return self.difference.step
        if self.scale == "spread":
            spread = _deviation(derivatives, usable)
            return torch.where(spread > 0, 1 / spread, 0)
        return 1.0


def split(batch: Batch, groups: int | Literal["examples"]) -> list[tuple[float, Batch]]:
    """A batch in parts of consecutive examples, as equal as can be, each with its share of them.

    Raises:
        UserError: its tensors don't all hold a row for each example, as the patches of images.
    """
    if groups == 1:
        return [(1.0, batch)]
    found = {tuple(tensor.shape[:1]) for tensor in batch.values()}
    if len(found) != 1 or found == {()}:
        raise UserError(
            "this batch can't be told apart into examples, since its tensors don't all have a row for "
            "each (patches of images haven't); use a method that perturbs all examples alike"
        )
    rows = found.pop()[0]
    count = rows if groups == "examples" else min(groups, rows)
    ends = [rows * i // count for i in range(count + 1)]
    return [((b - a) / rows, cut(batch, a, b)) for a, b in itertools.pairwise(ends)]


def _deviation(values: Tensor, usable: Tensor) -> Tensor:
    """Standard deviation [] of the usable values, nan of fewer than two; nothing is read."""
    count = usable.sum()
    mean = torch.where(usable, values, 0).sum() / count
    squares = torch.where(usable, values - mean, 0).square().sum()
    return (squares / (count - 1)).sqrt()
