"""FLOPs and peak memory of a computation, counted in one pass as its operators are dispatched.

The memory count is exact and independent of the allocator: it is the largest sum of bytes of
storages that were alive at once, created within the block. It sees saved activations, tangents,
temporaries and outputs alike, on the CPU, on CUDA and on meta.

torch's own ``FlopCounterMode`` can't serve beside it: its module hooks keep tensors of a recomputed
block alive, which hides what checkpointing saves. Its table of FLOPs per operator is used.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

TEMPORARY = "temporary"
aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {  # torch knows no formula of the CPU's fused attention
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(slots=True)
class _Storage:
    """Bytes, category, and the numbers of the allocations at which it came and went."""

    size: int
    born: int
    died: int | None
    category: str
    loop: int


@dataclass(frozen=True)
class Timeline:
    """The storages of a computation in the order in which they came.

    Attributes:
        sizes: bytes of each, [n].
        died: number of the last storage that came while each was there, [n].
        loops: number of the ``looping`` block in which each came, [n]; 0 outside.
    """

    sizes: NDArray[np.float64]
    died: NDArray[np.int64]
    loops: NDArray[np.int64]

    @property
    def peak(self) -> float:
        """Largest number of bytes that were there at once."""
        gone = np.bincount(self.died + 1, self.sizes, len(self.sizes) + 1)
        return float(np.cumsum(self.sizes - gone[:-1]).max(initial=0))

    def unrolled(self) -> Timeline:
        """The same with one storage for all that come and go within a loop, of their peak's size."""
        sizes, died, kept = self.sizes.copy(), self.died.copy(), np.ones(len(self.sizes), bool)
        loops = np.zeros_like(died)
        for loop in np.unique(self.loops[self.loops > 0]):
            there = np.flatnonzero(self.loops == loop)
            inside = there[died[there] <= there[-1]]
            if len(inside):
                gone = np.searchsorted(inside, died[inside], "right") - 1
                sizes[inside[0]] = Timeline(sizes[inside], gone, gone).peak
                died[inside[0]], loops[inside[0]] = there[-1], loop
                kept[inside[1:]] = False
        places = np.cumsum(kept) - 1
        return Timeline(sizes[kept], places[died[kept]], loops[kept])


_LOOPS, _NUMBERS = [0], itertools.count(1)
_TIMES: list[int | Fraction] = []  # one entry for each ``counted`` block at work


@contextlib.contextmanager
def counted(times: int | Fraction) -> Iterator[None]:
    """Within the block enclosing meters count FLOPs ``times`` over, for work that stands for as
    many equal pieces; if 0, nothing, memory neither. Meters begun inside count as ever."""
    _TIMES.append(times)
    try:
        yield
    finally:
        _TIMES.pop()


FREE = {  # operators that move nothing, beside views that say they are
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
LOOKUPS = {"embedding", "index", "index_select", "gather"}  # read of their table what they return
FILLING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}  # don't read


def moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads of its arguments and writes to its results, each tensor once."""
    name = func.overloadpacket.__name__
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    written = sum(_bytes(x) for x in tree_leaves(result) if isinstance(x, Tensor))
    if name in LOOKUPS or name in FILLING:
        read = written if name in LOOKUPS else 0
        return written + read + sum(map(_bytes, given[1:]))
    return written + sum(map(_bytes, given))


def _bytes(tensor: Tensor) -> int:
    """Without what an expanded tensor repeats, nor a zero tangent, which has no numbers."""
    if tensor._is_zerotensor():
        return 0
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


@contextlib.contextmanager
def looping() -> Iterator[None]:
    """For a loop of as many turns as a shape wants: timelines of other shapes can tell its storages."""
    _LOOPS.append(next(_NUMBERS))
    try:
        yield
    finally:
        _LOOPS.pop()


class Mode(TorchDispatchMode):
    """A dispatch mode of ours: compiled programs are none of its business, and the wrapper that keeps
    the compiler out would take a tenth of a trace."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Meter(Mode):
    """Counts FLOPs, and bytes of storages created, within the block.

    Args:
        existing: tensors that were there before; views of them cost nothing. If one is on meta,
            meta tensors count like others; if one is on a GPU, what lies in the host's memory
            doesn't.

    Attributes:
        flops: of matrix products, convolutions and attention kernels that torch has a formula
            for (a product of m x k and k x n counts 2 m k n), and of the CPU's fused attention;
            elementwise work is not counted. Fused attention counts two products forward, as the
            unfused form does, and five backward: its scores are computed again. What a causal
            mask would spare is counted.
        live: bytes alive now.
        peak: largest value of ``live`` so far.
        classify: what the storage of a new tensor is for; ``mark`` may say so later.
        work: how often operators ran that aren't views, by whether they multiply in half precision,
            FLOPs and bytes moved; counted if there is a counter.
    """

    classify: Callable[[Tensor], str] | None = None
    work: dict[tuple[bool, float, float], float] | None = None

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        before = list(existing)
        self._on_meta = any(t.is_meta for t in before)
        self._on_gpu = any(t.device.type not in ("cpu", "meta") for t in before)
        self._existing = {t.untyped_storage()._cdata for t in before}
        self._alive: dict[int, _Storage] = {}
        self._all: list[_Storage] = []
        self._peak_at = 0

    def __enter__(self) -> Meter:
        self._depth = len(_TIMES)
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        times = math.prod(_TIMES[self._depth :]) if _TIMES else 1
        if not times:
            return result
        formula = FLOPS.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula is not None else 0
        self.flops += int(times * flops)
        with torch._C.DisableTorchFunction():  # what is asked of tensors here is no function's work
            if self.work is not None and not (func.is_view or func in FREE):
                first = next((x for x in tree_leaves(result) if isinstance(x, Tensor)), None)
                half = first is not None and first.dtype in (torch.bfloat16, torch.float16)
                key = half, flops, moved(func, args, kwargs, result)
                if key[2]:  # else it only notes something for a profiler
                    self.work[key] = self.work.get(key, 0) + float(times)
            for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor._is_zerotensor() or (tensor.is_meta and not self._on_meta):
            return  # a shape without memory: an absent tangent, or what torch infers shapes with
        if self._on_gpu and tensor.device.type == "cpu":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._existing or key in self._alive:
            return
        category = self.classify(tensor) if self.classify is not None else TEMPORARY
        entry = self._alive[key] = _Storage(
            storage.nbytes(), len(self._all), None, category, _LOOPS[-1]
        )
        self._all.append(entry)
        self.live += entry.size
        if self.live > self.peak:
            self.peak, self._peak_at = self.live, entry.born
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        entry = self._alive.pop(key)
        entry.died = len(self._all) - 1
        self.live -= entry.size

    def mark(self, tensor: Tensor, category: str) -> None:
        """Name what a tensor's storage is for, unless that has been named or was there before."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry.category == TEMPORARY:
            entry.category = category

    def mark_living(self, category: str) -> None:
        """Name everything that is alive now and has no name yet."""
        for entry in self._alive.values():
            if entry.category == TEMPORARY:
                entry.category = category

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the moment of the peak; they add up to ``peak``."""
        found: dict[str, int] = {}
        for entry in self._all:
            if entry.born <= self._peak_at and (entry.died is None or entry.died >= self._peak_at):
                found[entry.category] = found.get(entry.category, 0) + entry.size
        return found

    def timeline(self) -> Timeline:
        """What came and went, to be computed with."""
        last = len(self._all) - 1
        died = [last if entry.died is None else entry.died for entry in self._all]
        sizes = np.array([entry.size for entry in self._all], np.float64)
        loops = np.array([entry.loop for entry in self._all], np.int64)
        return Timeline(sizes, np.array(died, np.int64), loops)
