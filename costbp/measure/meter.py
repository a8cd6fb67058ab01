"""FLOPs and peak memory of a computation, counted in one pass as its operators are dispatched.

The memory count is exact and independent of the allocator: it is the largest sum of bytes of
storages that were alive at once, created within the block. It sees saved activations, tangents,
temporaries and outputs alike.

torch's own ``FlopCounterMode`` can't serve beside it: its module hooks keep tensors of a recomputed
block alive, which hides what checkpointing saves. Its table of FLOPs per operator is used.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts FLOPs, and bytes of storages created, within the block.

    Args:
        existing: tensors that were there before; views of them cost nothing.

    Attributes:
        flops: of matrix products, convolutions and attention kernels that torch has a formula
            for (a product of m x k and k x n counts 2 m k n); elementwise work is not counted,
            and neither is the fused CPU attention kernel.
        live: bytes alive now.
        peak: largest value of ``live`` so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
