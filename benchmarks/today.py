"""What people use today, written as they write it: the figures ours are printed beside.

Each does the whole estimate, its gradient included, so that it is compared with like.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from costbp.objective import Batch, Objective


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def stock_jvp(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """Forward gradient by ``torch.func.jvp`` of a ``functional_call`` on a dict of parameters."""
    parameters = _trainable(objective.module)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, slope = _derivative(objective, batch, parameters, tangents)
    return {name: slope * t for name, t in tangents.items()}


@torch.no_grad()
def stock_vmap_jvp(objective: Objective, batch: Batch, count: int) -> dict[str, Tensor]:
    """The same for several directions at once by ``torch.func.vmap``."""
    parameters = _trainable(objective.module)
    tangents = {
        name: torch.randn(count, *p.shape, device=p.device, dtype=p.dtype)
        for name, p in parameters.items()
    }
    slopes = vmap(lambda t: _derivative(objective, batch, parameters, t)[1])(tangents)
    return {name: torch.tensordot(slopes, t, 1) / count for name, t in tangents.items()}


def _derivative(objective: Objective, batch: Batch, parameters: Any, tangents: Any) -> Any:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return objective.loss(functional_call(objective.module, values, (batch,)), batch)

    return jvp(loss, (parameters,), (tangents,))


def shift(parameters: Sequence[Tensor], seed: int, step: float) -> None:
    """Add ``step`` times a direction to parameters in place; the seed names the direction."""
    torch.manual_seed(seed)
    for p in parameters:
        p.add_(torch.normal(0.0, 1.0, p.shape, device=p.device, dtype=p.dtype), alpha=step)


@torch.no_grad()
def in_place_difference(objective: Objective, batch: Batch, eps: float, seed: int = 0) -> None:
    """Zeroth order as in MeZO (arXiv 2305.17333, algorithm 1): +eps, -2 eps and +eps in place,
    noise drawn again each time; the gradient goes to the parameters' ``.grad``."""
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    shift(parameters, seed, eps)
    up = objective.value(batch)
    shift(parameters, seed, -2 * eps)
    down = objective.value(batch)
    shift(parameters, seed, eps)
    slope = (up - down) / (2 * eps)
    torch.manual_seed(seed)
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(torch.normal(0.0, 1.0, p.shape, device=p.device, dtype=p.dtype) * slope)


def changed_in_place(theta: Tensor, eps: float) -> float:
    """Share of entries that are not bit-equal after +eps, -2 eps, +eps in place."""
    moved = theta.clone()
    for step in (eps, -2 * eps, eps):
        shift([moved], 0, step)
    return float((moved != theta).float().mean())


def switch_checkpointing_on(model: nn.Module) -> None:
    """transformers' own gradient checkpointing."""
    inner: Any = model.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 renames it
        inner.gradient_checkpointing_enable({"use_reentrant": False})
