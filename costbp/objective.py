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
from itertools import pairwise
from typing import Any, NamedTuple

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


PIECE = 2**22  # numbers of a parameter that are drawn, moved and stepped at once: at least so many,
SHARE = 2**9  # or this part of all; a piece in float32 and in half precision is 0.6 % of theta then


class Piece(NamedTuple):
    """Consecutive rows of a trainable parameter; of all but large ones: all of it.

    Attributes:
        name: of the parameter.
        place: what its draws are keyed by: the parameter's place, and the piece's in a large one.
        entries: where it lies in ``theta``.
        rows: the parameter's (its first axis) that it holds.
    """

    name: str
    place: tuple[int, ...]
    entries: slice
    rows: slice

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(self.entries.stop - self.entries.start)


def _pieces(name: str, place: int, start: int, shape: torch.Size, most: int) -> list[Piece]:
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if rows * width <= most:
        return [Piece(name, (place,), slice(start, start + rows * width), slice(0, rows))]
    ends = [*range(0, rows, max(1, most // width)), rows]
    return [
        Piece(name, (place, i), slice(start + a * width, start + b * width), slice(a, b))
        for i, (a, b) in enumerate(pairwise(ends))
    ]


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
        slices: parameter name -> (start, stop, shape) inside ``theta``.
        pieces: parameter name -> its pieces.
        sparing: whether nobody needs a gradient of length d, so that none is there before a step
            (``estimators/update.py`` decides).
        split: the parts in which a batch is computed one after the other, each with its share of the
            batch's mean loss; losses, derivatives and gradients are those of the whole. None: at once.
        widest: outputs of the widest linear layer: a scale for the size of activations.

    Raises:
        UserError: nothing is trainable, or trainable parameters differ in dtype or device.
    """

    split: Split | None = None
    sparing = False

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("nothing to train: no parameter of the model has requires_grad")
        if len({(p.dtype, p.device) for _, p in named}) > 1:
            raise UserError("trainable parameters must share one dtype and one device")
        self.module, self.loss = module, loss
        self.theta = torch.cat([p.detach().reshape(-1) for _, p in named])
        self._buffer: Tensor | None = None
        self.slices: dict[str, tuple[int, int, torch.Size]] = {}
        self.pieces: dict[str, list[Piece]] = {}
        start, most = 0, max(PIECE, self.d // SHARE)
        for place, (name, parameter) in enumerate(named):
            stop = start + parameter.numel()
            self.slices[name] = (start, stop, parameter.shape)
            self.pieces[name] = _pieces(name, place, start, parameter.shape, most)
            parameter.data = self.theta[start:stop].view(parameter.shape)
            start = stop
        self._trained = [parameter for _, parameter in named]
        self.widest = max(
            (m.out_features for m in module.modules() if isinstance(m, nn.Linear)), default=0
        )
        self._pieces_of = {id(parameter): self.pieces[name] for name, parameter in named}
        self._noise: int | None = None
        self._random = [m for m in module.modules() if _drops_out(m)]

    @property
    def buffer(self) -> Tensor:
        """The gradient, one vector [d], made when it is first asked for; the parameters' ``.grad`` are
        views of it. It is the one vector that an estimate may fill and hand out."""
        if self._buffer is None:
            self._buffer = torch.zeros_like(self.theta)
            self.hold_gradients()
        return self._buffer

    def hold_gradients(self) -> None:
        """Make the parameters' ``.grad`` views of ``buffer``, also after somebody has dropped them."""
        for parameter, (start, stop, shape) in zip(
            self._trained, self.slices.values(), strict=True
        ):
            parameter.grad = self.buffer[start:stop].view(shape)

    def drop_gradients(self) -> None:
        """Be without ``buffer`` until somebody asks for it."""
        self._buffer = None
        for parameter in (self.theta, *self._trained):
            parameter.grad = None

    def existing(self) -> list[Tensor]:
        """Every tensor that is there before a step: parameters, buffers, theta, the gradient."""
        module = self.module
        gradient = [] if self.sparing else [self.buffer]
        return [*module.parameters(), *module.buffers(), self.theta, *gradient]

    @property
    def d(self) -> int:
        """Number of trainable parameters."""
        return self.theta.numel()

    @property
    def large(self) -> bool:
        """Whether vectors of length d are made only where there is no other way."""
        return self.d > PIECE

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

    def perturbed(self, offset: Callable[[Piece], Tensor]) -> TorchFunctionMode:
        """Within the block every use of a trainable parameter sees parameter + ``offset(piece)``
        (a new tensor, [numel] of that piece, float32 or wider).

        The sum lives for one operator at a time, of a large linear layer or embedding for one piece,
        and the parameters themselves are never written: theta stays bit-equal in any dtype and no
        second copy of it is made. No gradient flows.
        """
        return self.replaced(lambda p, v: offset(p).view(v.shape).add_(v).to(v.dtype))

    def replaced(self, new: Callable[[Piece, Tensor], Tensor]) -> TorchFunctionMode:
        """Within the block operators are given ``new(piece, value)`` for each piece of each trainable
        parameter that they are called with."""
        return _Replaced(self._pieces_of, new)

    def finite(self) -> bool:
        """Whether every trainable parameter is finite."""
        return math.isfinite(float(self.theta.sum()))


def _scaled(share: Tensor, loss: Tensor) -> Tensor:
    return (share * loss).to(loss.dtype)


class _Replaced(TorchFunctionMode):
    """Hands operators another tensor for each trainable parameter they are called with: for a large
    one's linear layer or look-up of rows one piece after the other, so that none is whole."""

    def __init__(
        self, pieces: Mapping[int, list[Piece]], new: Callable[[Piece, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.pieces, self.new = pieces, new

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not _reads_values(func):
            return func(*args, **(kwargs or {}))
        pieces = self.pieces.get(id(args[1]), []) if len(args) > 1 else []
        if len(pieces) > 1 and func.__name__ == "linear":
            return self._linear(func, pieces, *args, **(kwargs or {}))
        if len(pieces) > 1 and func.__name__ == "embedding" and not (kwargs or {}).get("max_norm"):
            return self._rows(pieces, *args[:2])
        args = tuple(self._replaced(value) for value in args)
        return func(*args, **{key: self._replaced(value) for key, value in (kwargs or {}).items()})

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            pieces = self.pieces.get(id(value), [])
            if len(pieces) > 1:
                return torch.cat([self.new(piece, value[piece.rows]) for piece in pieces])
            return self.new(pieces[0], value) if pieces else value
        if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
            return type(value)(self._replaced(v) for v in value)
        return value

    def _linear(
        self, func: Any, pieces: list[Piece], x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        bias, output = self._replaced(bias), None
        for piece in pieces:
            new, rows = self.new(piece, weight[piece.rows]), piece.rows
            part = func(x, new, bias if bias is None else bias[rows])
            if output is None:
                output = part.new_empty(*part.shape[:-1], len(weight))
            output[..., rows] = part
        assert output is not None
        return output

    def _rows(self, pieces: list[Piece], places: Tensor, weight: Tensor) -> Tensor:
        """Of pieces in which nothing is looked up nothing is drawn, which takes one wait for the
        device."""
        rows, order = places.flatten().sort()
        ends = torch.tensor([piece.rows.stop for piece in pieces], device=rows.device)
        output, first = weight.new_empty(len(rows), *weight.shape[1:]), 0
        for piece, last in zip(pieces, torch.searchsorted(rows, ends).tolist(), strict=True):
            if first < last:
                new, wanted = self.new(piece, weight[piece.rows]), rows[first:last]
                output[order[first:last]] = new[wanted - piece.rows.start]
            first = last
        return output.view(*places.shape, *weight.shape[1:])


VIEWS = {"T", "mT", "H", "mH", "data", "real"}  # attributes that hand out a tensor's values


def _reads_values(func: Any) -> bool:
    """False for attributes such as ``shape`` and ``dtype``, which need no perturbed copy."""
    return func.__name__ != "__get__" or func.__self__.__name__ in VIEWS
