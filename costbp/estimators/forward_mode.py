"""Forward-mode AD at its floor: linear layers whose tangent rules skip products with zeros.

The stock rule of ``F.linear`` multiplies by the tangent of the weight even where that is a zero
tensor, so that a frozen layer runs three products (input, input tangent, zero weight tangent)
where two suffice. A ``TorchFunctionMode`` sees every ``F.linear`` call, whoever makes it, and
gives it a rule for exactly the tangents that exist. No module is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)


def has_tangent(x: Tensor | None) -> bool:
    """Whether ``x`` carries a tangent now. Asking the tensor, not a list of parameter ids, also
    answers for weights that are dequantised on the fly."""
    return x is not None and fwad.unpack_dual(x).tangent is not None


class _Linear(torch.autograd.Function):
    """``x @ w.T + b`` with the tangents named by ``live`` (of x, w, b) and no others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, live: tuple[bool, bool, bool]) -> Tensor:
        return F.linear(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, w, _, ctx.live = inputs
        # Whatever a tangent doesn't multiply isn't kept.
        ctx.save_for_forward(x if ctx.live[1] else None, w if ctx.live[0] else None)

    @staticmethod
    def jvp(ctx: Any, tx: Tensor, tw: Tensor, tb: Tensor, _: None) -> Tensor:
        x, w = ctx.saved_tensors
        of_x, of_w, of_b = ctx.live
        parts = []
        if of_x:
            parts.append(F.linear(tx.to(w.dtype), w))
        if of_w:
            parts.append(F.linear(x, tw.to(x.dtype)))
        tangent = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return tangent + tb.to(tangent.dtype) if of_b else tangent


class _SameDtype(torch.autograd.Function):
    """Identity whose tangent takes the primal's dtype: layer_norm's is float32 under bf16."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.to(ctx.dtype)


class FloorRules(TorchFunctionMode):
    """Within this mode ``F.linear`` differentiates forward at its floor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, w = args[:2]
            b = args[2] if len(args) > 2 else kwargs.get("bias")
            live = (has_tangent(x), has_tangent(w), has_tangent(b))
            if live[0] or live[1]:
                return _Linear.apply(x, w, b, live)
        result = func(*args, **kwargs)
        if func is F.layer_norm and result.dtype in HALF:
            result = _SameDtype.apply(result)
        return result


def directional_derivatives(
    loss: Callable[[Tensor], Tensor], theta: Tensor, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [] and derivatives [K] of ``loss`` at ``theta`` [d] along ``tangents`` [K, d].

    One direction is a plain jvp; more are batched over a primal that is computed once. No graph
    is built. Dropout draws one mask, shared by primal and all tangents.
    """
    # the fused attention kernel has no forward rule
    with torch.no_grad(), FloorRules(), sdpa_kernel(SDPBackend.MATH):
        if len(tangents) == 1:
            value, derivative = _jvp(loss, theta, tangents[0])
            return value, derivative.reshape(1)
        axes: Any = (None, 0)  # one loss, a derivative per tangent
        batched = vmap(lambda t: _jvp(loss, theta, t), out_dims=axes, randomness="same")
        return batched(tangents)


def _jvp(loss: Callable[[Tensor], Tensor], theta: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    result: Any = jvp(loss, (theta,), (tangent,))
    return result
