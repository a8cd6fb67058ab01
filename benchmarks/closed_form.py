"""FLOPs of forward-mode AD in closed form, from the products of one forward pass.

A product a b has the tangents ta b + a tb: with K directions, K products for each factor that
carries a tangent beside the one of the primal. Summed over all products of a forward pass that is
the floor; the count of a dispatched jvp is held against it. Nothing of ``costbp.estimators`` or of
the dispatch counter is used here: operators are seen as Python calls, FLOPs follow from shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from costbp.objective import Batch, Objective

CONVOLUTIONS: set[Callable[..., Any]] = {F.conv1d, F.conv2d, F.conv3d}
FIRST: dict[Callable[..., Any], int] = {  # operator -> place of its first factor
    F.linear: 0,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), 0),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), 0),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), 1),
    **dict.fromkeys(CONVOLUTIONS, 0),
}


class Products(TorchFunctionMode):
    """Sees the products made within the block.

    Attributes:
        flops: of products with 0, 1 and 2 factors that carry a tangent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = [0, 0, 0]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FIRST:
            a, b = args[FIRST[func] : FIRST[func] + 2]
            summed = b[0].numel() if func in CONVOLUTIONS else a.shape[-1]
            self.flops[_dual(a) + _dual(b)] += 2 * result.numel() * summed
        return result

    def forward_mode(self, directions: int) -> int:
        """FLOPs of a forward pass that carries so many tangents; 0: of a plain one."""
        return sum(f * (1 + directions * factors) for factors, f in enumerate(self.flops))


def _dual(factor: Tensor) -> bool:
    return fwad.unpack_dual(factor).tangent is not None


@torch.no_grad()
def products(objective: Objective, batch: Batch) -> Products:
    """The products of one forward pass, with a tangent on every trainable parameter."""
    with fwad.dual_level():
        parameters = {
            name: fwad.make_dual(p.detach(), torch.ones_like(p))
            for name, p in objective.module.named_parameters()
            if p.requires_grad
        }
        with Products() as seen:
            objective.loss(functional_call(objective.module, parameters, (batch,)), batch)
    return seen
