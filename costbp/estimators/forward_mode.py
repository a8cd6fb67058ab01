"""Forward-mode AD at its floor: linear layers whose tangent rules skip products with zeros.

The stock rule of ``F.linear`` multiplies by the tangent of the weight even where that is a zero
tensor, so that a frozen layer runs three products (input, input tangent, zero weight tangent)
where two suffice. Here ``F.linear`` has a rule for exactly the tangents that exist while a derivative
is computed. No module is changed.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap

from costbp.errors import UserError
from costbp.estimators.attention import with_tangents
from costbp.estimators.precision import HALF
from costbp.objective import Batch, Objective, at_work

DUAL = torch._C.DispatchKey.ADInplaceOrView  # the layer of torch that knows tangents
PACKED = {"weight", "qweight", "packed_weight"}  # names of buffers that hold quantised weights


@contextlib.contextmanager
def floor_rules() -> Iterator[None]:
    """Within the block the operators below differentiate forward at their floor, whoever calls them
    by these names. Nothing else is intercepted: a mode that sees every operator costs more Python than
    a small layer's arithmetic.
    """
    linear, layer_norm = F.linear, F.layer_norm

    def floor_linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Any:
        of = [None if t is None else fwad.unpack_dual(t).tangent for t in (x, w, b)]
        if of[0] is None and of[1] is None:
            return linear(x, w, b)
        x, w = fwad.unpack_dual(x).primal, fwad.unpack_dual(w).primal
        value = linear(x, w, None if b is None else fwad.unpack_dual(b).primal)
        return fwad.make_dual(value, _linear_tangent(x, w, *of).to(value.dtype))

    def same_dtype(*args: Any, **kwargs: Any) -> Any:
        result = layer_norm(*args, **kwargs)
        if result.dtype not in HALF:
            return result
        primal, tangent = fwad.unpack_dual(result)  # its tangent is float32
        return result if tangent is None else fwad.make_dual(primal, tangent.to(primal.dtype))

    attention = with_tangents(F.scaled_dot_product_attention)
    functions = {"linear": floor_linear, "layer_norm": same_dtype}
    functions["scaled_dot_product_attention"] = attention
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(F, name, function))
        for name, rule in ELEMENTWISE:
            operator = _one_tangent(getattr(Tensor, name), rule)
            stack.enter_context(mock.patch.object(Tensor, name, operator))
        yield


def _one_tangent(operator: Any, rule: Any) -> Any:
    """``operator`` of two factors of which one has a tangent. Its stock rule makes a zero tangent for
    the other and finds the result's shape in Python: some 100 us, which a GPU's kernel takes none
    of."""

    def run(x: Tensor, y: Any) -> Any:
        if torch._C._dispatch_tls_is_dispatch_key_excluded(DUAL):  # inside an operator
            return operator(x, y)
        of_x, of_y = _tangent(x), _tangent(y)
        if (of_x is None) == (of_y is None):
            return operator(x, y)
        if of_x is None:
            y = fwad.unpack_dual(y).primal
        else:
            x = fwad.unpack_dual(x).primal
        value = operator(x, y)
        tangent = rule(operator, x, y, of_x, of_y)
        return fwad.make_dual(value, tangent.to(value.dtype).expand(value.shape))

    return run


def _tangent(value: Any) -> Tensor | None:
    return fwad.unpack_dual(value).tangent if isinstance(value, Tensor) else None


def _of_product(times: Any, x: Any, y: Any, of_x: Tensor | None, of_y: Tensor | None) -> Any:
    return times(x, of_y) if of_x is None else times(of_x, y)


def _of_sum(plus: Any, x: Any, y: Any, of_x: Tensor | None, of_y: Tensor | None) -> Any:
    tangent: Any = of_y if of_x is None else of_x
    return tangent.clone()  # the sum may be changed in place


ELEMENTWISE = [("__mul__", _of_product), ("__add__", _of_sum)]


def _linear_tangent(
    x: Tensor, w: Tensor, of_x: Tensor | None, of_w: Tensor | None, of_b: Tensor | None
) -> Tensor:
    """Tangent of ``x @ w.T + b`` from the tangents that exist: their products and no others."""
    parts = []
    if of_x is not None:
        parts.append(F.linear(of_x.to(w.dtype), w))
    if of_w is not None:
        parts.append(F.linear(x, of_w.to(x.dtype)))
    tangent = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return tangent if of_b is None else tangent + of_b.to(tangent.dtype)


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

    single = len(tangents) == 1

    try:
        with torch.no_grad(), floor_rules():
            if single:
                return _derivative(objective, batch, tangents[0])
            return _derivatives(objective, batch, tangents)
    except (NotImplementedError, RuntimeError) as error:
        if re.search("forward AD|forward-mode|jvp|forward mode|tried to vmap", str(error)) is None:
            raise
        raise UserError(_without_rule(objective.module, error)) from error


def _derivative(objective: Objective, batch: Batch, tangent: Tensor) -> tuple[Tensor, Tensor]:
    with fwad.dual_level():
        loss = objective.at(fwad.make_dual(objective.theta, tangent), batch)
        value, slope = fwad.unpack_dual(loss)
        return value, (torch.zeros_like(value) if slope is None else slope).reshape(1)


def _derivatives(objective: Objective, batch: Batch, tangents: Tensor) -> tuple[Tensor, Tensor]:
    def along(tangent: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = jvp(lambda theta: objective.at(theta, batch), (objective.theta,), (tangent,))
        return result

    axes: Any = (None, 0)  # one loss, a derivative per tangent
    return vmap(along, out_dims=axes, randomness="same")(tangents)


_LOOKED_AT: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _refuse_quantised(module: nn.Module) -> None:
    """A layer whose weights are packed integers needs a tangent rule of its own, and says so by an
    attribute ``tangent_rule``. Looked at once."""
    if module in _LOOKED_AT:
        return
    for name, child in module.named_modules():
        if getattr(child, "tangent_rule", False):
            continue
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
    _LOOKED_AT.add(module)


def _without_rule(module: nn.Module, error: BaseException) -> str:
    """What to tell the user: the innermost module at work when the operator was refused."""
    function = ""
    trace = error.__traceback__
    while trace is not None:
        applied = trace.tb_frame.f_locals.get("cls")
        if isinstance(applied, type) and issubclass(applied, torch.autograd.Function):
            function = applied.__name__.removesuffix("Generated")
        trace = trace.tb_next
    named = re.search(r"forward AD with (\S+) that", str(error))
    operator = function or (named.group(1) if named else str(error).splitlines()[0])
    return (
        f"module {at_work(module, error)}: operator '{operator}' has no forward-mode rule; "
        "use BP or ZO for this model"
    )
