"""Forward-mode attention in memory that grows with the length instead of its square.

For a block of queries, with scores s = c q k^T + mask and weights p = softmax(s),

    ds = c (dq k^T + q dk^T),  dp = p * (ds - sum(p * ds)),  do = dp v + p dv.

Value and tangents are made of the same weights, so that no scores are computed twice; all directions
share them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from costbp.estimators.precision import HALF
from costbp.meter import counted, looping

BLOCK = 2**26  # bytes of a block's scores in all directions; queries are cut so that they fit


def with_tangents(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``F.scaled_dot_product_attention`` that differentiates forward.

    FLOPs, with T queries of H heads, S keys, and width D of both: 4 T S H D for the value; for each
    direction 2 T S H D for every tangent among those of query, key and value, and as much again if
    query or key has one. So it is with unfused attention, too, and as everywhere what a causal mask
    spares is counted. Memory beyond arguments and results is a few blocks of scores.

    Args:
        stock: what runs where no argument has a tangent; its unfused form, where shapes broadcast
            or the mask has one.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        given = query, key, value, attn_mask
        options = {"scale": scale, "enable_gqa": enable_gqa}
        pairs = [(None, None) if x is None else fwad.unpack_dual(x) for x in given]
        primals, tangents = zip(*pairs, strict=True)
        if all(tangent is None for tangent in tangents):
            return stock(*given, dropout_p, is_causal, **options)
        shared = query.shape[1] // key.shape[1] if enable_gqa else 1
        known = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
        known = known and query.shape[:2] == (len(key), shared * key.shape[1])
        if not known or tangents[3] is not None:
            with sdpa_kernel(SDPBackend.MATH):
                return stock(*given, dropout_p, is_causal, **options)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        found = _Attention.apply(*tangents[:3], *primals, dropout_p, is_causal, factor)
        return fwad.make_dual(*found)

    return attention


class _Attention(torch.autograd.Function):
    """Value and tangent, neither to be differentiated again. A batch of tangents is of directions."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        one: Any = [None if x is None else x.unsqueeze(0) for x in args[:3]]
        value, tangents = _blockwise(*one, *args[3:])
        return value, tangents.squeeze(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        if any(dim is not None for dim in dims[3:]):
            raise NotImplementedError("tried to vmap what attention's tangents belong to")
        many = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, dims, strict=True)]
        for i, (x, dim) in enumerate(zip(args[:3], dims, strict=False)):
            if x is not None and dim is None:
                many[i] = x.expand(info.batch_size, *x.shape)
        return _blockwise(*many), (None, 0)


def _blockwise(
    of_query: Tensor | None,
    of_key: Tensor | None,
    of_value: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Value [B, H, T, E] of queries [B, H, T, D] that meet keys [B, G, S, D] and values [B, G, S, E] of
    as many heads or fewer, and its tangents [K, B, H, T, E] by those that exist, each [K, ...]."""
    (batch, heads, length, width), (_, keyed, places, wide) = query.shape, value.shape
    n, each = batch * keyed, heads // keyed
    count = next(len(x) for x in (of_query, of_key, of_value) if x is not None)
    query = query.reshape(n, each, length, width)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    if of_query is not None:  # [n, K, H / G, T, D]
        of_query = of_query.reshape(count, *query.shape).transpose(0, 1)
    if of_key is not None:  # [n K, S, D]
        of_key = of_key.reshape(count, *key.shape).transpose(0, 1).flatten(0, 1)
    if of_value is not None:  # [n, S, K E]
        of_value = of_value.reshape(count, *value.shape).permute(1, 2, 0, 3).flatten(2)
    precise = torch.float32 if query.dtype in HALF else query.dtype
    result = value.new_empty(batch, length, keyed, each, wide)  # heads side by side
    tangents = value.new_empty(count, *result.shape)
    size = max(1, BLOCK // (count * batch * heads * places * precise.itemsize))
    at = torch.arange(max(length, places), device=query.device)

    def block(rows: slice, seen: int) -> None:
        q, k = query[:, :, rows].mul(scale).flatten(1, 2), key[:, :seen].mT
        scores = torch.bmm(q, k).view(batch, heads, -1, seen)
        if mask is not None:
            _masked(scores, mask if mask.shape[-2] == 1 else mask[..., rows, :])
        if causal:
            _masked(scores, at[:seen] <= at[rows, None])
        softmax = torch.softmax if mask is None else torch._safe_softmax  # rows without a place
        p = softmax(scores, -1, dtype=precise).view(n, 1, -1, seen)
        del scores
        ds = None  # [n, K, H / G rows, S]
        if of_query is not None:
            ds = torch.bmm(of_query[:, :, :, rows].mul(scale).flatten(1, 3), k)
        if of_key is not None:
            both = q.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1), of_key[:, :seen].mT
            before = None if ds is None else ds.view(n * count, -1, seen)
            ds = torch.bmm(*both) if before is None else torch.baddbmm(before, *both, out=before)
        if ds is not None:
            ds = ds.view(n, count, -1, seen).to(precise).mul_(p)
            ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
        if dropout:
            kept = torch.empty_like(p).bernoulli_(1 - dropout).div_(1 - dropout)
            p.mul_(kept)
            ds = None if ds is None else ds.mul_(kept)
        p = p.view(n, -1, seen).to(value.dtype)
        spread = batch, keyed, each, -1, wide
        result[:, rows] = torch.bmm(p, value[:, :seen]).view(spread).permute(0, 3, 1, 2, 4)
        here = tangents[:, :, rows]
        if of_value is not None:
            moved = torch.bmm(p, of_value[:, :seen]).view(*spread[:4], count, wide)
            here.copy_(moved.permute(4, 0, 3, 1, 2, 5))
        if ds is not None:
            moved = torch.bmm(ds.to(value.dtype).view(n, -1, seen), value[:, :seen])
            moved = moved.view(batch, keyed, count, *spread[2:]).permute(2, 0, 4, 1, 3, 5)
            here.copy_(moved) if of_value is None else here.add_(moved)

    # in a trace one block stands for all that are like it
    step = length - length % size if query.is_meta and size < length else size
    with looping():
        for start in range(0, length, step):
            stop = min(start + size, length)
            seen = min(stop, places) if causal and not query.is_meta else places
            with counted(Fraction(places, seen) * (step // size if start + step <= length else 1)):
                block(slice(start, stop), seen)
    return result.flatten(2, 3).transpose(1, 2), tangents.flatten(3, 4).transpose(2, 3)


def _masked(scores: Tensor, mask: Tensor) -> None:
    """Add a mask [..., rows or 1, S] to scores in place; of a boolean one, True takes part."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), -torch.inf)
    else:
        scores.add_(mask)
