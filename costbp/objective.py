"""The trainable parameters as one flat vector, and the loss as a function of it.

Everything above this file (estimators, optimiser, checkpoint) deals with a vector ``theta`` of
length d; everything below it (modules, adapters, tasks) with named parameters.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from costbp.errors import UserError

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]
Split = Callable[[Batch], Iterable[tuple[Tensor, Batch]]]


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Examples ``start`` to ``stop`` of a batch; one that is no plain mapping cuts itself."""
    own = getattr(batch, "cut", None)
    return own(start, stop) if own else {name: rows[start:stop] for name, rows in batch.items()}


@dataclass(frozen=True)
class Key:
    """Names one draw of randomness: (seed, step, path). Equal keys give equal draws."""

    seed: int
    step: int
    path: tuple[int, ...] = ()

    def at(self, index: int) -> Key:
        """The key of a sub-draw; nests to any depth."""
        return Key(self.seed, self.step, (*self.path, index))

    @property
    def number(self) -> int:
        """A 63-bit seed made of all parts (SplitMix64 finaliser, Steele et al. 2014)."""
        mixed = 0
        for part in (self.seed, self.step, *(index + 1 for index in self.path)):
            mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            mixed ^= mixed >> 31
        return mixed >> 1

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator seeded by this key. The meta device, which draws nothing, gets the
        CPU's."""
        device = torch.device("cpu" if torch.device(device).type == "meta" else device)
        return torch.Generator(device).manual_seed(self.number)


def _drops_out(module: nn.Module) -> bool:
    """Whether a module draws a mask in training: by ``nn.Dropout``, or by a rate of its own that
    it hands to the functional form, as OPT's and Llama's attention do."""
    return any(
        isinstance(value, float) and value > 0
        for name, value in vars(module).items()
        if "dropout" in name or (name == "p" and isinstance(module, nn.Dropout))
    )


def at_work(module: nn.Module, error: BaseException) -> str:
    """``'name' (Class)`` of the innermost submodule that was running when ``error`` was raised."""
    names = {id(child): name for name, child in module.named_modules()}
    place, kind = "", type(module).__name__
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            place, kind = names[id(owner)], type(owner).__name__
        trace = trace.tb_next
    return f"'{place}' ({kind})"


class Objective:
    """A module's loss as a function of its trainable parameters.

    Args:
        module: called as ``module(batch)``; its parameters with ``requires_grad`` are trained.
        loss: ``loss(output, batch)``, a scalar tensor.

    Attributes:
        theta: the trainable parameters, one leaf of shape [d]; module parameters are views of it.
        buffer: the gradient, one vector of shape [d]; the parameters' ``.grad`` are views of it.
            It is the one vector that an estimate may fill and hand out.
        slices: parameter name -> (start, stop, shape) inside ``theta``.
        split: the parts in which a batch is computed one after the other, each with its share of the
            batch's mean loss; losses, derivatives and gradients are those of the whole. None: at once.
        widest: outputs of the widest linear layer: a scale for the size of activations.

    Raises:
        UserError: nothing is trainable, or trainable parameters differ in dtype or device.
    """

    split: Split | None = None

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("nothing to train: no parameter of the model has requires_grad")
        if len({(p.dtype, p.device) for _, p in named}) > 1:
            raise UserError("trainable parameters must share one dtype and one device")
        self.module, self.loss = module, loss
        self.theta = torch.cat([p.detach().reshape(-1) for _, p in named])
        self.buffer = torch.zeros_like(self.theta)
        self.slices: dict[str, tuple[int, int, torch.Size]] = {}
        start = 0
        for name, parameter in named:
            stop = start + parameter.numel()
            self.slices[name] = (start, stop, parameter.shape)
            parameter.data = self.theta[start:stop].view(parameter.shape)
            start = stop
        self._trained = [parameter for _, parameter in named]
        self.hold_gradients()
        self.widest = max(
            (m.out_features for m in module.modules() if isinstance(m, nn.Linear)), default=0
        )
        self._names = {id(parameter): name for name, parameter in named}
        self._noise: int | None = None
        self._random = [m for m in module.modules() if _drops_out(m)]

    def hold_gradients(self) -> None:
        """Make the parameters' ``.grad`` views of ``buffer``, also after somebody has dropped them."""
        for parameter, (start, stop, shape) in zip(
            self._trained, self.slices.values(), strict=True
        ):
            parameter.grad = self.buffer[start:stop].view(shape)

    def existing(self) -> list[Tensor]:
        """Every tensor that is there before a step: parameters, buffers, theta, the gradient."""
        module = self.module
        return [*module.parameters(), *module.buffers(), self.theta, self.buffer]

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return self.theta.numel()

    @contextlib.contextmanager
    def noise(self, key: Key) -> Iterator[None]:
        """Within the block every forward pass draws the same dropout masks, named by ``key``; each
        part of a batch has its own.

        Without it the two losses of a finite difference would differ by their masks alone.
        """
        previous, self._noise = self._noise, key.number if self._has_dropout() else None
        try:
            yield
        finally:
            self._noise = previous

    def _has_dropout(self) -> bool:
        """Whether a forward pass would draw random numbers now."""
        return any(module.training for module in self._random)

    def _seed(self, part: int = 0) -> None:
        if self._noise is not None:
            torch.manual_seed(self._noise + part)

    def _terms(self, batch: Batch, loss: Callable[[Batch], Tensor]) -> Iterator[Tensor]:
        """What a batch's loss [] is the sum of, one part's after the other."""
        if self.split is None:
            self._seed()
            yield loss(batch)
            return
        for index, (share, part) in enumerate(self.split(batch)):
            self._seed(index)
            yield _scaled(share, loss(part))

    def _plain(self, batch: Batch) -> Tensor:
        return self.loss(self.module(batch), batch)

    def value(self, batch: Batch) -> Tensor:
        """Loss [] of the module as it stands."""
        return functools.reduce(operator.add, self._terms(batch, self._plain))

    def output(self, batch: Batch) -> Tensor:
        """What the module puts out as it stands."""
        self._seed()
        output: Tensor = self.module(batch)
        return output

    def at(self, theta: Tensor, batch: Batch) -> Tensor:
        """Loss [] at ``theta`` [d]: the pure function that ``jvp`` and ``vmap`` want."""
        parameters = {
            name: theta[start:stop].view(shape)
            for name, (start, stop, shape) in self.slices.items()
        }

        def loss(part: Batch) -> Tensor:
            return self.loss(functional_call(self.module, parameters, (part,)), part)

        return functools.reduce(operator.add, self._terms(batch, loss))

    def gradient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [] and gradient [d] by one backward pass a part, summed in theta's dtype. The gradient
        is the objective's own buffer, overwritten by the next call: clone it to keep it."""
        self.buffer.zero_()

        def differentiated(loss: Tensor) -> Tensor:
            loss.backward()
            return loss.detach()  # without its graph, before the next part's

        losses = map(differentiated, self._terms(batch, self._plain))
        return functools.reduce(operator.add, losses), self.buffer

    @contextlib.contextmanager
    def returning(self) -> Iterator[Tensor]:
        """Within the block ``theta`` may be written; afterwards it comes back from the copy [d]
        that the block is given, bit-equal. (Adding and subtracting in place leaves about half of
        all entries changed in the last place.)"""
        home = self.theta.clone()
        try:
            yield home
        finally:
            self.theta.copy_(home)

    def perturbed(self, offset: Callable[[str], Tensor]) -> TorchFunctionMode:
        """Within the block every use of a trainable parameter sees parameter + ``offset(name)``
        (a new tensor, [numel] of that parameter, float32 or wider).

        The sum lives for one operator at a time and the parameters themselves are never written:
        theta stays bit-equal in any dtype and no second copy of it is made. No gradient flows.
        """
        return _Perturbed(self._names, offset)

    def finite(self) -> bool:
        """Whether every trainable parameter is finite."""
        return math.isfinite(float(self.theta.sum()))


def _scaled(share: Tensor, loss: Tensor) -> Tensor:
    return (share * loss).to(loss.dtype)


class _Perturbed(TorchFunctionMode):
    """Hands operators a perturbed copy of each trainable parameter they are called with."""

    def __init__(self, names: Mapping[int, str], offset: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.names, self.offset = names, offset

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if _reads_values(func):
            args = tuple(self._replaced(value) for value in args)
            kwargs = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is None:
                return value
            return self.offset(name).view(value.shape).add_(value).to(value.dtype)
        if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
            return type(value)(self._replaced(v) for v in value)
        return value


VIEWS = {"T", "mT", "H", "mH", "data", "real"}  # attributes that hand out a tensor's values


def _reads_values(func: Any) -> bool:
    """False for attributes such as ``shape`` and ``dtype``, which need no perturbed copy."""
    return func.__name__ != "__get__" or func.__self__.__name__ in VIEWS
