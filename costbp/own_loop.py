"""A method of the catalog in a training loop of your own: any module, any loss, any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from costbp.config.entries import Strict
from costbp.config.load import overlaid
from costbp.config.methods import MethodEntry
from costbp.config.read import validate
from costbp.config.yaml_file import read_yaml
from costbp.errors import UserError, suggest
from costbp.estimators.base import Estimate
from costbp.estimators.probe import settle
from costbp.estimators.update import decide, update
from costbp.objective import Key, Objective

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
SHIPPED = Path(__file__).parent.parent / "config" / "catalog" / "methods.yaml"


class _Methods(Strict):
    methods: dict[str, MethodEntry]


class Method:
    """A catalog entry, to be put to work on a module by ``on``.

    Args:
        name: in the catalog.
        optimizer: makes the optimiser from a list with the one flat vector [d] of trained parameters
            (``functools.partial(torch.optim.SGD, lr=0.01)``); by default the entry's.
        settings: values laid over the entry, by dotted key: ``{"estimator.directions.count": 4}``.
        catalog: a file of methods; by default the shipped one.

    Raises:
        UserError: no such method, or a setting that isn't allowed.
    """

    def __init__(
        self,
        name: str,
        *,
        optimizer: MakeOptimizer | None = None,
        settings: Mapping[str, Any] | None = None,
        catalog: Path | str = SHIPPED,
    ) -> None:
        path = Path(catalog)
        data = {"methods": read_yaml(path)}
        entries = validate(_Methods, data, [(path, data)]).methods
        if name not in entries:
            raise UserError(f"{path}: no method '{name}'; {suggest(name, entries)}")
        entry = entries[name]
        self.entry = overlaid(entry, settings, "settings") if settings else entry
        self.make_optimizer = optimizer

    def on(self, module: nn.Module, loss: Loss, *, seed: int = 0) -> Steps:
        """The method at work: what of ``module`` has ``requires_grad`` is trained.

        Args:
            loss: ``loss(module, batch)``, a scalar tensor; batches are whatever it takes.
            seed: of directions and dropout masks.
        """
        return Steps(self, module, loss, seed)


class Steps:
    """Optimiser steps of a method on a module, whose parameters are trained in place.

    Attributes:
        objective: the loss as a function of the flat vector ``objective.theta``.
        optimizer: steps that vector.
        step: steps made so far.
    """

    def __init__(self, method: Method, module: nn.Module, loss: Loss, seed: int) -> None:
        self.objective = Objective(_Called(module, loss), lambda output, batch: output)
        self.estimator = method.entry.build()
        make, theta = method.make_optimizer, self.objective.theta
        self.optimizer = make([theta]) if make else method.entry.optimizer.build(theta)
        decide(self.objective, self.estimator, self.optimizer)
        self.seed, self.step = seed, 0
        self._settled = False

    @property
    def batches(self) -> int:
        """Batches that the next step looks at: one, but for accumulation and SVRG's snapshots."""
        return len(self.estimator.passes(self.step))

    def estimate(self, *batches: Any) -> Estimate:
        """Estimate the gradient, and leave it in the parameters' ``.grad``.

        Raises:
            ValueError: not as many batches as the step looks at.
        """
        estimate = self._estimated(batches)
        if estimate.gradient is not self.objective.buffer:
            self.objective.buffer.copy_(estimate.gradient)
        self.objective.hold_gradients()
        return estimate

    def _estimated(self, batches: Sequence[Any]) -> Estimate:
        if len(batches) != self.batches:
            raise ValueError(
                f"step {self.step} looks at {self.batches} batches, not {len(batches)}"
            )
        if not self.objective.sparing:
            self.objective.hold_gradients()
        flat, key = [_Flat(batch) for batch in batches], Key(self.seed, self.step)
        if not self._settled:
            settle(self.objective, self.estimator, flat[0], key)
            self._settled = True
        estimate = self.estimator.estimate(self.objective, flat, key)
        self.step += 1
        return estimate

    def __call__(self, *batches: Any) -> Tensor:
        """One step on as many batches as it looks at; returns the mean loss [] before it."""
        estimate = self._estimated(batches)
        update(self.objective, self.optimizer, estimate)
        return estimate.loss

    def over(self, batches: Iterable[Any]) -> Iterator[Tensor]:
        """Steps on the batches of a loader, one after the other; yields each step's loss []. What is
        left at the end and too little for a step is left out."""
        stream = iter(batches)
        while len(taken := list(islice(stream, self.batches))) == self.batches:
            yield self(*taken)

    def state_dict(self) -> dict[str, Any]:
        """What a later run continues from, beside the module's own parameters."""
        difference = self.estimator.difference
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict(),
            "difference": dict(vars(difference))
            if difference is not None and self._settled
            else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.estimator.load_state_dict(state["estimator"])
        if state["difference"] is not None and self.estimator.difference is not None:
            vars(self.estimator.difference).update(state["difference"])
        self._settled = self.step > 0


class _Flat(dict[str, Tensor]):
    """A batch's tensors by number, and how to put it together again."""

    def __init__(self, batch: Any) -> None:
        self.leaves, self.structure = tree_flatten(batch)
        super().__init__({str(i): v for i, v in enumerate(self.leaves) if isinstance(v, Tensor)})

    def cut(self, start: int, stop: int) -> _Flat:
        """Rows of every tensor, as a batch of the same structure."""
        cut = [v[start:stop] if isinstance(v, Tensor) else v for v in self.leaves]
        return _Flat(tree_unflatten(cut, self.structure))


class _Called(nn.Module):
    """A module and its loss as a module that is called with a flat batch; returns the loss []."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: _Flat) -> Tensor:
        return self.loss(self.module, tree_unflatten(batch.leaves, batch.structure))
