"""Forward-mode AD at its floor: linear layers whose tangent rules skip products with zeros.

The stock rule of ``F.linear`` multiplies by the tangent of the weight even where that is a zero
tensor, so that a frozen layer runs three products (input, input tangent, zero weight tangent)
where two suffice. A ``TorchFunctionMode`` sees every ``F.linear`` call, whoever makes it, and
gives it a rule for exactly the tangents that exist. No module is changed.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from costbp.console import say
from costbp.errors import UserError
from costbp.objective import Batch, Objective

PACKED = {"weight", "qweight", "packed_weight"}  # names of buffers that hold quantised weights
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
        if func is F.scaled_dot_product_attention:
            _notice_fused_attention()
        result = func(*args, **kwargs)
        if func is F.layer_norm and result.dtype in HALF:
            result = _SameDtype.apply(result)
        return result


def directional_derivatives(
    objective: Objective, batch: Batch, tangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [] and derivatives [K] at theta along ``tangents`` [K, d].

    One direction is a plain jvp; more are batched over a primal that is computed once. No graph
    is built. Dropout draws one mask, shared by primal and all tangents.

    Raises:
        UserError: a layer has no forward rule; names module and operator. Quantised layers are
            refused beforehand, since their tangent would silently be zero.
    """
    _refuse_quantised(objective.module)

    def derivative(tangent: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = jvp(lambda theta: objective.at(theta, batch), (objective.theta,), (tangent,))
        return result

    try:
        # the fused attention kernel has no forward rule
        with torch.no_grad(), FloorRules(), sdpa_kernel(SDPBackend.MATH):
            if len(tangents) == 1:
                value, slope = derivative(tangents[0])
                return value, slope.reshape(1)
            axes: Any = (None, 0)  # one loss, a derivative per tangent
            return vmap(derivative, out_dims=axes, randomness="same")(tangents)
    except (NotImplementedError, RuntimeError) as error:
        if re.search("forward AD|forward-mode|jvp|forward mode", str(error)) is None:
            raise
        raise UserError(_without_rule(objective.module, error)) from error


@functools.cache
def _notice_fused_attention() -> None:
    say("notice: fused attention has no forward-mode rule; FmAD runs its unfused form instead")


def _refuse_quantised(module: nn.Module) -> None:
    """A layer whose weights are packed integers needs a tangent rule of its own."""
    for name, child in module.named_modules():
        own = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for key, tensor in own:
            packed = not tensor.is_floating_point() and (
                isinstance(tensor, nn.Parameter) or key in PACKED
            )
            if packed:
                raise UserError(
                    f"module '{name}' ({type(child).__name__}) holds quantised weights ('{key}', "
                    f"{tensor.dtype}) without a forward-mode rule: its derivative would silently "
                    "be zero; use an unquantised base, BP or ZO"
                )


def _without_rule(module: nn.Module, error: BaseException) -> str:
    """What to tell the user: the innermost module at work when the operator was refused."""
    names = {id(child): name for name, child in module.named_modules()}
    place, kind = "", type(module).__name__
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            place, kind = names[id(owner)], type(owner).__name__
        trace = trace.tb_next
    text = str(error).splitlines()[0]
    named = re.search(r"forward AD with (\S+)|autograd\.Function '?(\w+)|(\w+Backward\w*)", text)
    operator = next(filter(None, named.groups()), "") if named else text
    return (
        f"module '{place}' ({kind}): operator '{operator}' has no forward-mode rule; "
        "use BP or ZO for this model"
    )
