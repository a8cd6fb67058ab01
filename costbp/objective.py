"""The trainable parameters as one flat vector, and the loss as a function of it.

Everything above this file (estimators, optimiser, checkpoint) deals with a vector ``theta`` of
length d; everything below it (modules, adapters, tasks) with named parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Key:
    """Names one draw of randomness: (seed, step, index). Equal keys give equal draws."""

    seed: int
    step: int
    index: int = 0

    def at(self, index: int) -> Key:
        """The key of a sub-draw; nests without collisions for up to 2**20 indices a level."""
        return Key(self.seed, self.step, (self.index << 20) + index + 1)

    @property
    def number(self) -> int:
        """A 63-bit seed made of the three parts (SplitMix64 finaliser, Steele et al. 2014)."""
        mixed = 0
        for part in (self.seed, self.step, self.index):
            mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 31
        return mixed >> 1

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator seeded by this key."""
        return torch.Generator(device).manual_seed(self.number)


class Objective:
    """A module's loss as a function of its trainable parameters.

    Args:
        module: called as ``module(batch)``; its parameters with ``requires_grad`` are trained.
        loss: ``loss(output, batch)``, a scalar tensor.

    Attributes:
        theta: the trainable parameters, one leaf of shape [d]; module parameters are views of it.
        slices: parameter name -> (start, stop, shape) inside ``theta``.
        blocks: repeated sub-modules (found by ``memory_plans``) are looked up in ``module``.

    Raises:
        ValueError: nothing is trainable, or trainable parameters differ in dtype or device.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("nothing to train: no parameter has requires_grad")
        if len({(p.dtype, p.device) for _, p in named}) > 1:
            raise ValueError("trainable parameters must share one dtype and one device")
        self.module, self.loss = module, loss
        self.theta = torch.cat([p.detach().reshape(-1) for _, p in named])
        self._gradient = torch.zeros_like(self.theta)
        self.slices: dict[str, tuple[int, int, torch.Size]] = {}
        start = 0
        for name, parameter in named:
            stop = start + parameter.numel()
            self.slices[name] = (start, stop, parameter.shape)
            parameter.data = self.theta[start:stop].view(parameter.shape)
            parameter.grad = self._gradient[start:stop].view(parameter.shape)
            start = stop
        self._noise: int | None = None

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return self.theta.numel()

    @contextlib.contextmanager
    def noise(self, key: Key) -> Iterator[None]:
        """Within the block every forward pass draws the same dropout masks, named by ``key``.

        Without it the two losses of a finite difference would differ by their masks alone.
        """
        previous, self._noise = self._noise, key.number if self._has_dropout() else None
        try:
            yield
        finally:
            self._noise = previous

    def _has_dropout(self) -> bool:
        """Whether a forward pass would draw random numbers now."""
        return any(
            isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in self.module.modules()
        )

    def _seed(self) -> None:
        if self._noise is not None:
            torch.manual_seed(self._noise)

    def value(self, batch: Batch) -> Tensor:
        """Loss [] of the module as it stands."""
        self._seed()
        return self.loss(self.module(batch), batch)

    def at(self, theta: Tensor, batch: Batch) -> Tensor:
        """Loss [] at ``theta`` [d]: the pure function that ``jvp`` and ``vmap`` want."""
        self._seed()
        parameters = {
            name: theta[start:stop].view(shape)
            for name, (start, stop, shape) in self.slices.items()
        }
        return self.loss(functional_call(self.module, parameters, (batch,)), batch)

    def gradient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [] and gradient [d] by one backward pass. The gradient is the objective's own
        buffer, overwritten by the next call: clone it to keep it."""
        self._gradient.zero_()
        loss = self.value(batch)
        loss.backward()
        return loss.detach(), self._gradient

    @contextlib.contextmanager
    def displaced(self, displacement: Tensor) -> Iterator[None]:
        """Within the block the module stands at ``theta + displacement`` ([d]).

        The parameters come back from a copy, bit-equal: subtracting what was added would leave
        about half of them changed in the last place.
        """
        home = self.theta.clone()
        try:
            self.theta.add_(displacement)
            yield
        finally:
            self.theta.copy_(home)

    def finite(self) -> bool:
        """Whether every trainable parameter is finite."""
        return math.isfinite(float(self.theta.sum()))
