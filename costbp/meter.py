"""FLOPs and peak memory of a computation, counted in one pass as its operators are dispatched.

The memory count is exact and independent of the allocator: it is the largest sum of bytes of
storages that were alive at once, created within the block. It sees saved activations, tangents,
temporaries and outputs alike, on the CPU, on CUDA and on meta.

torch's own ``FlopCounterMode`` can't serve beside it: its module hooks keep tensors of a recomputed
block alive, which hides what checkpointing saves. Its table of FLOPs per operator is used.
"""

from __future__ import annotations

import contextlib
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


@dataclass(frozen=True)
class Timeline:
    """The storages of a computation in the order in which they came.

    Attributes:
        sizes: bytes of each, [n].
        died: number of the last storage that came while each was there, [n].
    """

    sizes: NDArray[np.float64]
    died: NDArray[np.int64]

    @property
    def peak(self) -> float:
        """Largest number of bytes that were there at once."""
        gone = np.bincount(self.died + 1, self.sizes, len(self.sizes) + 1)
        return float(np.cumsum(self.sizes - gone[:-1]).max(initial=0))


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
    """

    classify: Callable[[Tensor], str] | None = None

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
        if formula is not None:
            self.flops += int(times * formula(*args, **kwargs, out_val=result))
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
        entry = self._alive[key] = _Storage(storage.nbytes(), len(self._all), None, category)
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
        return Timeline(sizes, np.array(died, np.int64))
