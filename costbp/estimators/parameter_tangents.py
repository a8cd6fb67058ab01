"""Derivatives along directions that are drawn again for each operator: no tangent of theta exists."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from costbp.estimators.directions import Directions
from costbp.estimators.precision import seen
from costbp.objective import Batch, Objective, Piece

# Python's, which a mode can't see
RULES = ((F, "linear"), (Tensor, "__mul__"), (Tensor, "__add__"))


def derivatives_by_piece(
    objective: Objective, batch: Batch, directions: Directions
) -> tuple[Tensor, Tensor]:
    """Loss [] and derivatives [K] at theta along directions as theta's dtype rounds them. The primal
    is computed once. ``floor_rules`` are to be at work."""
    dtype, count = objective.theta.dtype, directions.count
    directions.rounded = True
    if count == 1:
        with fwad.dual_level(), _given(objective, lambda p: directions.part(0, p).to(dtype)):
            value, slope = fwad.unpack_dual(objective.value(batch))
        return value, (torch.zeros_like(value) if slope is None else slope).reshape(1)

    def along(k: Tensor) -> tuple[Tensor, Tensor]:
        def tangent(piece: Piece) -> Tensor:
            drawn = [directions.part(i, piece).to(dtype) for i in range(count)]
            return torch.stack(drawn).index_select(0, k.reshape(1)).squeeze(0)

        def loss(_: Tensor) -> Tensor:
            with _given(objective, tangent):
                return objective.value(batch)

        nothing = objective.theta.new_zeros(())  # jvp wants an argument; it opens the level
        result: Any = jvp(loss, (nothing,), (nothing,))
        return result

    axes: Any = (None, 0)  # one loss, a derivative per tangent
    each = torch.arange(count, device=objective.theta.device)
    return vmap(along, out_dims=axes, randomness="same")(each)


@contextlib.contextmanager
def _given(objective: Objective, tangent: Callable[[Piece], Tensor]) -> Iterator[None]:
    """Within the block trainable parameters have tangents in each operator."""

    def dual(piece: Piece, value: Tensor) -> Tensor:
        # a copy, since a view's tangent gets a storage as long as the view's, which is all of theta
        return fwad.make_dual(value.clone(), tangent(piece).view(value.shape))

    with contextlib.ExitStack() as stack:
        for owner, name in RULES:
            rule = seen(name, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, rule))
        stack.enter_context(objective.replaced(dual))
        yield
