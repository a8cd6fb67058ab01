"""A block's saved tensors, computed again one part at a time when the backward pass asks for them."""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states


class _Enough(Exception):
    """Everything that a part saves has been computed again."""


class _Place:
    """Stands in the graph for a tensor that was to be saved."""

    def __init__(self, index: int) -> None:
        self.index = index


class Pass:
    """A forward pass that keeps its inputs alone, and is made of parts.

    Where the backward pass asks for a tensor of one part, all is run again from the inputs, with the
    random numbers and the autocast of the first time, up to the last tensor that this part saves; what
    earlier parts save is dropped on the way. So the tensors of one part exist at a time.
    (``torch.utils.checkpoint`` can do that only where each part is a function of its own.)

    Args:
        before: the pass that put out some of this one's inputs, if they aren't to be kept: when they are
            needed first, it is run again.
    """

    def __init__(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, before: Pass | None
    ) -> None:
        self.forward, self.before = forward, before
        leaves, self.spec = tree_flatten((args, kwargs))
        self.absent = before._among(leaves) if before else {}
        self.live = [isinstance(x, Tensor) and x.requires_grad for x in leaves]
        self.inputs = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        for n in self.absent:
            self.inputs[n] = None
        self.versions = [_version(x) for x in self.inputs]
        tensors = {x.device: x for x in leaves if isinstance(x, Tensor)}
        kinds = [device.type for device in tensors]
        self.kind = next((kind for kind in kinds if kind not in ("cpu", "meta")), None)
        self.random = torch.get_rng_state(), *get_device_states(*tensors.values())
        self.casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self.saved: list[weakref.ref[_Place]] = []
        self.ends: list[int] = []  # of all parts but the last, in numbers of saved tensors
        self.again: weakref.WeakKeyDictionary[_Place, Tensor] = weakref.WeakKeyDictionary()
        self.made: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # put out, in which version

    def first(self, args: Any, kwargs: Any) -> Any:
        """The pass itself, on its inputs as they came."""
        with saved_tensors_hooks(self._pack, self._unpack):
            result = self.forward(*args, **kwargs)
        found = enumerate(tree_leaves(result))
        self.made = {n: (weakref.ref(x), x._version) for n, x in found if isinstance(x, Tensor)}
        return result

    def _among(self, leaves: list[Any]) -> dict[int, int]:
        """Which ``leaves`` this pass put out, as they were then: their number -> the one here."""
        return {
            n: number
            for n, x in enumerate(leaves)
            for number, (made, version) in self.made.items()
            if isinstance(x, Tensor) and x.requires_grad and made() is x and version == x._version
        }

    def cut(self) -> None:
        """A part ends here."""
        self.ends.append(len(self.saved))

    def _pack(self, tensor: Tensor) -> _Place:
        place = _Place(len(self.saved))
        self.saved.append(weakref.ref(place))
        return place

    def _unpack(self, place: _Place) -> Tensor:
        if place not in self.again:
            self._recompute(bisect.bisect(self.ends, place.index))
        return self.again.pop(place)

    def _recompute(self, part: int) -> None:
        start, stop = [0, *self.ends, len(self.saved)][part : part + 2]
        count = 0

        def keep(tensor: Tensor) -> None:
            nonlocal count
            place = self.saved[count]() if count >= start else None
            if place is not None:
                self.again[place] = tensor.detach()
            count += 1
            if count == stop:
                raise _Enough

        hooks = saved_tensors_hooks(keep, _thrown_away)
        with contextlib.suppress(_Enough), torch.enable_grad(), hooks:
            self._run()

    def _run(self) -> Any:
        if self.before is not None:
            with torch.no_grad():
                made = tree_leaves(self.before._run())
            for n, number in self.absent.items():
                self.inputs[n], self.versions[n] = made[number], _version(made[number])
            self.before = None
        if self.versions != [_version(x) for x in self.inputs]:
            raise RuntimeError("the input of a block that is to be run again was changed in place")
        leaves = [
            x.detach().requires_grad_(live) if isinstance(x, Tensor) else x
            for x, live in zip(self.inputs, self.live, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with self._as_then():
            return self.forward(*args, **kwargs)

    @contextlib.contextmanager
    def _as_then(self) -> Iterator[None]:
        state, devices, states = self.random
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices, device_type=self.kind))
            torch.set_rng_state(state)
            set_device_states(devices, states, device_type=self.kind)
            for kind, dtype, enabled in self.casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _thrown_away(_: Any) -> Any:
    raise AssertionError("the graph of a pass that is run again has no tensors")
