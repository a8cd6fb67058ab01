"""bitsandbytes' four-bit layers as they take memory: shapes without numbers, for traces on meta."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costbp.config.profiles import FourBit
from costbp.models.packed import NF4_BLOCK, PackedLinear

SCALES = 256  # scales that share one, where they are quantised, too (arXiv 2305.14314, section 3)


class TracedFourBit(PackedLinear):
    """Half a byte a weight and a scale for each 64: of four bytes, or of one and four for 256 more.

    Args:
        layer: what is replaced, on meta.
        kind: what a layer keeps.
    """

    def __init__(self, layer: nn.Linear, kind: FourBit) -> None:
        super().__init__(layer)
        self.kind, count = kind, layer.weight.numel()
        made: Any = {"device": layer.weight.device}
        blocks = -(-count // NF4_BLOCK)
        self.register_buffer("qweight", torch.empty(-(-count // 2), dtype=torch.uint8, **made))
        dtype = torch.uint8 if kind.double else torch.float32
        self.register_buffer("scales", torch.empty(blocks, dtype=dtype, **made))
        if kind.double:
            self.register_buffer("scales_of_scales", torch.empty(-(-blocks // SCALES), **made))

    def forward(self, x: Tensor) -> Tensor:
        return _Kept.apply(x, self) if self.kind.keeps_inputs else super().forward(x)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        first = torch.float16 if self.kind.unpacked == "float16" else dtype
        shape, device = (self.out_features, self.in_features), self.get_buffer("qweight").device
        return torch.empty(shape, dtype=first, device=device).to(dtype)


class _Kept(torch.autograd.Function):
    """Holds its input by an attribute, which a backward pass doesn't clear: it goes with the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TracedFourBit) -> Tensor:
        ctx.layer, ctx.input = layer, x.detach()
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None
