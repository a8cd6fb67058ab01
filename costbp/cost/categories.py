"""What the bytes at a peak are for: names storages while a ``Meter`` counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C import _functorch as functorch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from costbp.meter import TEMPORARY, Meter
from costbp.objective import Batch, Objective

SAVED, TANGENTS, DIRECTIONS, LOGITS, GRADIENTS = (
    *("saved activations", "tangents", "directions", "logits and loss", "gradients"),
)
STEP = (SAVED, TANGENTS, DIRECTIONS, LOGITS, TEMPORARY)  # what a step creates


class Categories(TorchFunctionMode):
    """Within the block the storages that ``meter`` counts get their names.

    - saved activations: alive when the backward pass begins, so kept for it; the block inputs that
      a memory plan keeps among them.
    - tangents: forward-mode tangents that an operator takes or returns.
    - directions: drawn directions, [K, d] or a parameter's share, and what is added to parameters.
    - logits and loss: the model's output, what the loss makes of it, and everything as wide as the
      vocabulary, which a module may tell by an attribute of that name.
    - temporary: the rest. It lives inside an operator or a block; recomputed activations belong
      here.
    """

    def __init__(self, meter: Meter, objective: Objective) -> None:
        super().__init__()
        self.meter, self.objective = meter, objective
        self.width = getattr(objective.module, "vocabulary", 0) or -1
        self._in_loss = False

    def __enter__(self) -> Categories:
        self._loss, self._perturbed = self.objective.loss, self.objective.perturbed
        self.meter.classify = self._by_shape
        self.objective.loss = self._named_loss
        self.objective.perturbed = self._named_offsets  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.meter.classify = None
        self.objective.loss = self._loss
        del self.objective.perturbed  # the class's own again

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, OpOverload):  # from within an operator's own implementation
            return func(*args, **(kwargs or {}))
        if func is Tensor.backward:
            self.meter.mark_living(SAVED)
        result = func(*args, **(kwargs or {}))
        if fwad._current_level >= 0:
            for value in tree_leaves((args, kwargs, result)):
                tangent = fwad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
                if tangent is not None:
                    self.meter.mark(_plain(tangent), TANGENTS)
        return result

    def _by_shape(self, tensor: Tensor) -> str:
        last = tensor.shape[-1] if tensor.ndim else 0
        if self._in_loss or last == self.width:
            return LOGITS
        return DIRECTIONS if last == self.objective.d else TEMPORARY

    def _named_loss(self, output: Tensor, batch: Batch) -> Tensor:
        if isinstance(output, Tensor):  # parts are told by their width
            self.meter.mark(_plain(output), LOGITS)
        self._in_loss = True
        try:
            return self._loss(output, batch)
        finally:
            self._in_loss = False

    def _named_offsets(self, offset: Callable[[str], Tensor]) -> TorchFunctionMode:
        def named(name: str) -> Tensor:
            value = offset(name)
            self.meter.mark(value, DIRECTIONS)
            return value

        return self._perturbed(named)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor with storage inside functorch's wrappers."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor
