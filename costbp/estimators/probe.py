"""Before the first step: which step a finite difference takes, and how much of it is noise.

The error of a difference falls with its step until rounding takes over, and where that is depends on
the base's dtype, on the scale of the adapters and on d. So it is measured: differences along a few
directions are held against exact derivatives, or, where a model has no forward-mode rule or no room
for it, against those of the neighbouring step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from costbp.device import out_of_memory
from costbp.errors import UserError
from costbp.estimators.base import Difference, Estimator
from costbp.estimators.directions import Directions, Gaussian, Source
from costbp.estimators.oracles import Exact
from costbp.estimators.precision import HALF
from costbp.objective import Batch, Key, Objective

DIRECTIONS = 4
RATIO = 10**0.5  # between neighbouring steps; the usable window is about as wide
LIMITS = (1e-6, 1.0)
GOOD = 0.3  # relative error of derivatives that needs no better step: a cosine of about 0.95
COARSE = 0.1  # step on a piecewise constant loss, which must change some answers; never probed
PROBE = -3  # sub-key of the probe's directions and masks


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        eps: step of the difference.
        float32: whether losses are computed in float32 on a base in half precision.
        error: |difference - derivative| / |derivative| over the probed directions.
        cosine: between both, None where there was no exact derivative to compare with.
        forwards: forward passes that the probe took.
    """

    eps: float
    float32: bool
    error: float
    cosine: float | None
    forwards: int

    @property
    def snr(self) -> float:
        """Signal to noise, in power."""
        return min(1e12, self.error**-2) if self.error > 0 else 1e12

    def adopt(self, estimator: Estimator) -> None:
        """Let the estimator take its differences so."""
        assert estimator.difference is not None
        estimator.difference.eps, estimator.difference.float32 = self.eps, self.float32


def settle(objective: Objective, estimator: Estimator, batch: Batch, key: Key) -> Probe | None:
    """Settle the step and the precision of an estimator's differences at theta, on one batch.

    The step that is set (or 1e-3) is kept where its error is small, or where a method's entry
    fixes it. Else steps are tried in the direction in which the error falls; and where a base in
    half precision drowns them all, again in float32. None for estimators without differences.
    """
    difference = estimator.difference
    if difference is None:
        return None
    key = key.at(PROBE)
    source: Source = getattr(estimator.per_batch, "source", Gaussian())
    directions = source.typical(objective, key, DIRECTIONS)
    with objective.noise(key):
        truth = _exact(objective, batch, directions)
        search = _Search(objective, batch, directions, difference, truth)
        found = search.at(difference.step, False)
        if difference.eps is None:
            found = search.best(found)
            if found.error > GOOD and _half(objective):
                found = min(found, search.best(search.at(difference.step, True)), key=_error)
    exact = 0 if truth is None else 2 * DIRECTIONS
    probe = replace(found, forwards=search.taken + exact)
    probe.adopt(estimator)
    return probe


def _error(probe: Probe) -> float:
    return probe.error


def _round(eps: float) -> float:
    return float(f"{eps:.2g}")


@dataclass
class _Search:
    """Errors of differences on one batch, along the same directions."""

    objective: Objective
    batch: Batch
    directions: Directions
    difference: Difference
    truth: Tensor | None
    taken: int = 0
    known: dict[tuple[float, bool], Tensor] = field(default_factory=dict)

    def best(self, start: Probe) -> Probe:
        """The step of least error from ``start`` on, as far as errors fall."""
        best = start
        for ratio in (RATIO, 1 / RATIO):
            eps = _round(start.eps * ratio)
            while best.error > GOOD and LIMITS[0] < eps < LIMITS[1]:
                found = self.at(eps, start.float32)
                if found.error > 2 * best.error:
                    break
                best, eps = min(best, found, key=_error), _round(eps * ratio)
            if best is not start:
                break
        return best

    def at(self, eps: float, float32: bool) -> Probe:
        """The error of one step: against the truth or, without one, against the next step."""
        slopes = self._slopes(eps, float32)
        truth = self.truth if self.truth is not None else self._slopes(_round(eps * RATIO), float32)
        error = float((slopes - truth).norm() / truth.norm())
        cosine = float(torch.cosine_similarity(slopes, truth, dim=0))
        finite = math.isfinite(error)
        known = self.truth is not None and math.isfinite(cosine)
        return Probe(eps, float32, error if finite else 1e6, cosine if known else None, 0)

    def _slopes(self, eps: float, float32: bool) -> Tensor:
        if (eps, float32) not in self.known:
            trial = replace(self.difference, eps=eps, batched="never")  # not every model batches
            trial.float32 = float32
            slopes = trial(self.objective, self.batch, self.directions)[1]
            self.taken += trial.forwards(self.directions.count)
            self.known[eps, float32] = slopes.double()
        return self.known[eps, float32]


def _exact(objective: Objective, batch: Batch, directions: Directions) -> Tensor | None:
    """Exact derivatives, one direction at a time; None where there is no rule or no room."""
    try:
        return Exact(chunk=1)(objective, batch, directions)[1].double()
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            return None
        raise


def _half(objective: Objective) -> bool:
    return any(tensor.dtype in HALF for tensor in objective.existing())
