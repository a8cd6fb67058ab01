"""Running a model of any size without its weights: shapes are real, floating-point numbers aren't.

Floating-point tensors live on torch's meta device, which holds no numbers. Integers and booleans
that a program computes from its inputs (token ids, padding masks, image grids, rope positions)
stay real on the CPU, so that Python which branches on them runs as ever; an operator that is given
both sees meta ones. Plain meta refuses such programs, and ``FakeTensorMode`` fails on most models.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from costbp.meter import Mode

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
COUNTING = {aten.arange.default, aten.arange.start, aten.arange.start_step}
UNKNOWN = {  # operators whose result's shape or value is decided by numbers
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
WIDE = 2**24  # numbers of a mask, length x length, beyond which a trace only remembers its shape
IMPURE = UNKNOWN | {aten._local_scalar_dense.default, aten.index.Tensor, aten._to_copy.default}
PACKED = torch.uint8  # quantised weights, which are as absent as others


class MissingNumbersError(Exception):
    """An operator asked for numbers that a trace without weights doesn't have; its text names it."""


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Within the block new tensors are made as the module's text says. Build the model in it, too.

    Where Python reads a number that isn't there, it gets a one (of a boolean: true; of an integer:
    zero), and a mask of such numbers selects everything, so estimators take the path of finite
    losses.

    Raises:
        MissingNumbersError: an operator's result depends on numbers that aren't there.
    """
    # a mode would not see blocks that the backward pass computes again
    attention = functools.partial(_fused, F.scaled_dot_product_attention)
    with (
        mock.patch.object(F, "dropout", _as_on_cuda),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        META,
        _Numbers(),
        _Placement(),
    ):
        yield


class _Numbers(TorchFunctionMode):
    """What Python reads from tensors without numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.tolist and args[0].device == META:
            flat = [_number(args[0])] * args[0].numel()
            return torch.tensor(flat, device=CPU).reshape(args[0].shape).tolist()
        return func(*args, **(kwargs or {}))


def _as_on_cuda(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout with a mask of booleans, as GPUs keep it; elsewhere it has the input's dtype."""
    if not training or p == 0:
        return x
    return torch.native_dropout(x, p, True)[0]


def _fused(
    stock: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the operator that torch takes on CUDA, which keeps what that one keeps; meta's own
    choice is the unfused form. Flash wants no mask and half precision; the memory-efficient one wants
    as many keys' heads as queries', and keeps a copy of the mask in the queries' dtype."""
    wanted = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
    half = query.dtype in (torch.bfloat16, torch.float16)
    allowed = torch.backends.cuda.flash_sdp_enabled()  # False within ``sdpa_kernel(MATH)``
    equal = query.shape[-1] == value.shape[-1] and key.shape[1] == value.shape[1]
    if allowed and half and attn_mask is None and equal and query.shape[-1] <= 256:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    one_head_each = query.shape[1] == key.shape[1] == value.shape[1]
    if allowed and one_head_each and query.dtype != torch.float64:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.empty_like(attn_mask, dtype=query.dtype, device=META)
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        efficient = aten._scaled_dot_product_efficient_attention
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return efficient(query, key, value, attn_mask, graph, **options)[0]
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return stock(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _number(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 0


class _Placement(Mode):
    """Decides for each operator whether it runs on meta or on real integers."""

    _results: ClassVar[dict[Any, tuple[Any, ...]]] = {}  # operator and shapes -> result's form

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = _leaves((*args, *kwargs.values()))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if devices == {"meta"} and _is_pure(func):
            return self._remembered(func, args, kwargs, leaves)
        if func is aten._local_scalar_dense.default and devices == {"meta"}:
            return _number(args[0])
        if func is aten.index.Tensor and args[0].device == META:
            args = (args[0], [_all_true(index) for index in args[1]])
        if func is aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            return _moved(args[0], kwargs)
        if not tensors and kwargs.get("device") == META:
            if _is_integer(func, args, kwargs):
                kwargs["device"] = CPU
            else:
                kwargs |= {"generator": None} if "generator" in kwargs else {}  # meta draws nothing
        elif len(devices) > 1 or _is_outer(func, tensors):
            if func is aten.copy_.default and args[0].device == CPU:
                return args[0]
            args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
        if func in UNKNOWN and "meta" in devices:
            name = func.overloadpacket.__name__
            raise MissingNumbersError(name)
        return func(*args, **kwargs)

    def _remembered(self, func: Any, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        """Meta kernels are slow Python, and a model's blocks ask for the same shapes again."""
        key = (func, *(_signature(x) for x in leaves), *kwargs)
        known = self._results.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.device == META:
                given = {x.untyped_storage()._cdata for x in leaves if isinstance(x, Tensor)}
                if result.untyped_storage()._cdata not in given:  # some views don't say they are
                    self._results[key] = result.shape, result.stride(), result.dtype
            return result
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    """The leaves of an operator's arguments, which are at most lists of leaves, with their lengths."""
    flat: list[Any] = []
    for value in args:
        if isinstance(value, list | tuple):
            flat.append(len(value))
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def _signature(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


@functools.cache
def _is_pure(func: Any) -> bool:
    """Whether an operator returns one new tensor and changes none."""
    schema = func._schema
    aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return not aliases and len(schema.returns) == 1 and func not in IMPURE


def _is_outer(func: Any, tensors: list[Tensor]) -> bool:
    """Whether an operator on small tensors makes a wide one, as a mask's of all pairs of places."""
    if torch.Tag.pointwise not in func.tags or not tensors or not _is_pure(func):
        return False
    wide = math.prod(torch.broadcast_shapes(*(x.shape for x in tensors)))
    return wide > WIDE


def _moved(tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A copy to another device: floating point is on meta wherever the program wants it."""
    dtype = kwargs.get("dtype") or tensor.dtype
    if tensor.device == CPU and not dtype.is_floating_point:
        return tensor.to(dtype, copy=True)
    return torch.empty_like(tensor, dtype=dtype, device=META)


def _is_integer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func in COUNTING and all(isinstance(a, int) for a in args)
    return not dtype.is_floating_point and dtype != PACKED


def _as_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=META) if tensor.device == CPU else tensor


def _all_true(index: Tensor | None) -> Tensor | None:
    """A mask without numbers becomes the list of all places."""
    if index is None or index.dtype != torch.bool or index.device != META or index.ndim != 1:
        return index
    return torch.arange(len(index), device=META)
