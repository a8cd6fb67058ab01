"""An estimate becomes a step of the optimiser: whole, or one piece of theta after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from costbp.estimators.base import Estimate, Estimator, wide_dtype
from costbp.objective import PIECE, Batch, Key, Objective

# numbers: what is left of less, CPUs compute apart, and round otherwise in half precision
BLOCK = 64


def stateless(optimizer: Optimizer) -> bool:
    """Whether its step on a part of theta needs that part of the gradient alone, and leaves nothing
    behind: plain SGD's, weight decay included."""
    groups = optimizer.param_groups
    plain = type(optimizer) is torch.optim.SGD and len(groups) == 1
    return plain and not groups[0]["momentum"]


def decide(objective: Objective, estimator: Estimator, optimizer: Optimizer) -> None:
    """Whether there is to be a gradient of length d: not where theta is large, the optimiser stateless
    and the estimator's estimates come by piece."""
    objective.sparing = objective.large and estimator.by_piece and stateless(optimizer)
    if objective.sparing:
        objective.drop_gradients()


def update(objective: Objective, optimizer: Optimizer, estimate: Estimate) -> Tensor:
    """A step of an optimiser of the one parameter ``objective.theta``; returns the estimate's
    figures. By piece theta gets the bits that it gets as a whole (from one thread, or a GPU; of several
    threads each rounds its last block apart)."""
    if not (objective.sparing and stateless(optimizer)):
        objective.theta.grad = estimate.gradient
        optimizer.step()
        return estimate.figures
    (group,), norms = optimizer.param_groups, []
    try:
        for part, gradient in _parts(objective, estimate):
            part.grad = gradient
            group["params"] = [part]
            optimizer.step()
            dtype = wide_dtype(gradient.dtype)
            norms.append(torch.linalg.vector_norm(gradient, dtype=dtype))
    finally:
        group["params"] = [objective.theta]
    return estimate.figures_with(torch.stack(norms).norm())


def made(estimator: Estimator, objective: Objective, batches: Sequence[Batch], key: Key) -> None:
    """All that a step does but for the optimiser's part: for counting and timing."""
    for _ in _parts(objective, estimator.estimate(objective, batches, key)):
        pass


def _parts(objective: Objective, estimate: Estimate) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of theta, each with its share of the gradient: all of it or, where none is to be, pieces
    put together to about ``PIECE`` numbers, in whole blocks."""
    theta = objective.theta
    if not objective.sparing or isinstance(estimate.made, Tensor):
        yield theta, estimate.gradient
        return
    start, held = 0, []
    for piece, gradient in estimate.made.by_piece():
        held.append(gradient)
        stop = piece.entries.stop
        if stop - start < PIECE and stop < objective.d:
            continue
        run = torch.cat(held)
        stop -= (stop - start) % BLOCK if stop < objective.d else 0
        yield theta[start:stop], run[: stop - start]
        held, start = [run[stop - start :].clone()], stop
