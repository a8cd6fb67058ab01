"""Zeroth order on the outputs of linear layers instead of their weights."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from costbp.errors import UserError
from costbp.estimators.base import Difference, Estimate, Estimator, wide
from costbp.estimators.directions import normal
from costbp.estimators.oracles import Central
from costbp.estimators.precision import computing_in
from costbp.estimators.projected import split
from costbp.objective import Batch, Key, Objective


@dataclass
class NodePerturbation(Estimator):
    """The outputs y of every trained linear layer move by +-eps xi, xi ~ N(0, I). With D_i, the
    derivative of example i's loss along all of its xi (Widrow and Lehr 1990, Madaline rule III),

        dL_i / dy_i ~ D_i xi_i,  G_W = 1/n sum_i D_i xi_i x_i^T,  G_b = 1/n sum_i D_i xi_i,

    summed over an example's places. Unbiased up to eps^2; x is the mean of both sides' inputs. Two
    forward units, and the products G_W. The variance grows with an example's outputs, not with d.
    """

    how: Central

    @property
    def difference(self) -> Difference:
        return self.how

    def estimate(self, objective: Objective, batches: Sequence[Batch], key: Key) -> Estimate:
        (batch,) = batches
        layers, eps = _layers(objective), self.how.step
        inputs: dict[str, list[Tensor]] = defaultdict(list)

        def xi(name: str, like: Tensor) -> Tensor:
            generator = key.at(list(layers).index(name)).generator(like.device)
            return normal(like.numel(), generator, like.device, like.dtype).view_as(like)

        def losses(step: float) -> Tensor:
            def move(layer: Any, args: Any, output: Tensor, *, name: str) -> Tensor:
                inputs[name].append(args[0])
                return output + step * xi(name, output)

            with contextlib.ExitStack() as stack:
                for name, layer in layers.items():
                    hook = layer.register_forward_hook(functools.partial(move, name=name))
                    stack.callback(hook.remove)
                output = objective.output(batch)
            parts = enumerate(split(batch, "examples"))
            return torch.stack(
                [wide(objective.loss(output[i : i + 1], part)) for i, (_, part) in parts]
            )

        with torch.no_grad(), objective.noise(key), computing_in(self.how):
            up, down = losses(eps), losses(-eps)
        slopes = (up - down) / (2 * eps)
        shares = torch.where(torch.isfinite(slopes), slopes, 0) / len(slopes)
        for name, layer in layers.items():
            x = wide(inputs[name][0] + inputs[name][1]) / 2
            moved = xi(name, x.new_empty(*x.shape[:-1], layer.out_features))
            back = (moved.flatten(1).T * shares).T.reshape(-1, layer.out_features)
            for part, gradient in ("weight", back.T @ x.flatten(0, -2)), ("bias", back.sum(0)):
                if f"{name}.{part}" in objective.slices:
                    start, stop, _ = objective.slices[f"{name}.{part}"]
                    objective.buffer[start:stop] = gradient.flatten()
        return Estimate(objective.buffer, (up + down).mean() / 2, slopes)


def _layers(objective: Objective) -> dict[str, nn.Linear]:
    """The linear layers that hold all trained parameters, by name."""
    found = {n: m for n, m in objective.module.named_modules() if isinstance(m, nn.Linear)}
    owners = {name: name.rpartition(".")[0] for name in objective.slices}
    if others := [name for name, owner in owners.items() if owner not in found]:
        raise UserError(f"node_perturbation trains linear layers alone; '{others[0]}' is in none")
    return {owner: found[owner] for owner in owners.values()}
