"""Linear layers whose frozen weights are stored in four bits, with a rule for every mode of AD: our
own groups of integers, NF4 of bitsandbytes, and checkpoints that GPTQ made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costbp.errors import UserError
from costbp.models.trainable import HEADS

VISION = "visual"
NF4_BLOCK = 64  # weights that share a scale (Dettmers et al. 2023, section 3)
PER_WORD = 8  # 4-bit values in a 32-bit word
SAME = ("FalconLinear",)  # of transformers: computes what nn.Linear does in operators of its own
FEW = 0.05  # of the weights, which may stay: a router's, a short convolution's


class PackedLinear(nn.Linear, ABC):
    """``nn.Linear`` with a frozen weight that is packed. The weight in full exists for one product at
    a time, forward and backward, and is never saved.

    Args:
        layer: what is replaced; its bias is kept.
    """

    tangent_rule = True  # forward mode is told that packed weights are safe here

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    @abstractmethod
    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in full."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits=4"


class QuantisedLinear(PackedLinear):
    """Weights in groups of 4-bit integers around 8, each group along the inputs with a scale of its
    own: (4 + 16 / group) bits a weight, rounded to the nearest.

    Args:
        layer: what is replaced; its weight may be on meta.
        group: inputs that share a scale.

    Raises:
        UserError: the layer's inputs are no multiple of ``group``.
    """

    qweight: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear, group: int) -> None:
        super().__init__(layer)
        if self.in_features % group:
            raise UserError(
                f"source.group = {group} does not divide the {self.in_features} inputs of a layer"
            )
        packed, scales = quantise(layer.weight.detach(), group)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.qweight, self.scales).to(dtype)


def quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Pack a weight [out, in]: bytes [out, in / 2] of two values each, scales [out, in / group]."""
    blocks = weight.unflatten(1, (-1, group))
    scales = blocks.abs().amax(2) / 7
    levels = (blocks / scales.clamp_min(torch.finfo(weight.dtype).tiny).unsqueeze(2)).round()
    levels = levels.clamp(-8, 7).add(8).flatten(1).to(torch.uint8)
    return levels[:, ::2] | (levels[:, 1::2] << 4), scales


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """The weight [out, in] in the scales' dtype."""
    levels = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    weight = levels.to(scales.dtype).sub_(8)
    weight.unflatten(1, (scales.shape[1], -1)).mul_(scales.unsqueeze(2))
    return weight


class Nf4Linear(PackedLinear):
    """Weights in the sixteen levels of NF4 (Dettmers et al. 2023, arXiv 2305.14314), packed and
    unpacked by bitsandbytes; its own layer has no forward-mode rule and on some CPUs repacks.

    Raises:
        UserError: bitsandbytes isn't installed.
    """

    qweight: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        packed, state = _bitsandbytes().quantize_4bit(
            layer.weight.detach().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4"
        )
        self.dtype = layer.weight.dtype
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", state.absmax)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        library = _bitsandbytes()
        state = library.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            code=library.get_4bit_type("nf4", device=self.qweight.device),
        )
        found: Tensor = library.dequantize_4bit(self.qweight, state)
        return found.to(dtype)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            "source.packing = 'nf4' needs bitsandbytes: pip install -e '.[gpu]'; or use packing rtn"
        ) from error
    return functional


class GptqLinear(PackedLinear):
    """Weights as a GPTQ checkpoint stores them (Frantar et al. 2023, arXiv 2210.17323): eight inputs
    a word in ``qweight`` [in / 8, out], zero points eight outputs a word in ``qzeros``
    [groups, out / 8], ``scales`` [groups, out], and each input's group in ``g_idx`` [in].

    Args:
        layer: what is replaced.
        group: inputs that share a scale; -1: all of them.
        less_one: zero points are stored less one, as the format's first version does.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, layer: nn.Linear, group: int, *, less_one: bool = True) -> None:
        super().__init__(layer)
        group = self.in_features if group == -1 else group
        if self.in_features % PER_WORD or self.out_features % PER_WORD:
            raise UserError(f"a GPTQ layer's sizes are multiples of {PER_WORD}, not {layer}")
        self.less_one = less_one
        groups = -(-self.in_features // group)
        words = partial(torch.zeros, dtype=torch.int32)
        self.register_buffer("qweight", words(self.in_features // PER_WORD, self.out_features))
        self.register_buffer("qzeros", words(groups, self.out_features // PER_WORD))
        scales = torch.zeros(groups, self.out_features, dtype=torch.float16)
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", (torch.arange(self.in_features) // group).int())

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.qweight.device)
        levels = (self.qweight.unsqueeze(1) >> shifts.view(1, -1, 1)) & 15  # [in / 8, 8, out]
        zeros = (self.qzeros.unsqueeze(2) >> shifts) & 15  # [groups, out / 8, 8]
        centre = zeros.flatten(1).to(torch.int16) + int(self.less_one)
        group = self.g_idx.long()
        weight = (levels.flatten(0, 1).to(torch.int16) - centre[group]).to(self.scales.dtype)
        return weight.mul_(self.scales[group]).T.to(dtype)


def is_packed(name: str, layer: nn.Module) -> bool:
    """Whether a 4-bit base packs the layer of this dotted name: linear layers but for heads, which
    may be trained, and the vision tower, which the 4-bit releases leave as it is."""
    linear = type(layer) is nn.Linear or type(layer).__name__ in SAME
    return linear and not _stays(name)


def _stays(name: str) -> bool:
    return bool({*HEADS, VISION} & set(name.split(".")))


def packed_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that a 4-bit base packs, and has not yet, with their dotted names.

    Raises:
        UserError: much of what would be packed isn't in linear layers.
    """
    found, packed, others = [], 0, {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            packed += layer.in_features * layer.out_features
        elif is_packed(name, layer):
            found.append((name, cast(nn.Linear, layer)))
            packed += found[-1][1].weight.numel()
        elif not (_stays(name) or isinstance(layer, nn.Embedding)):
            own = [p.numel() for p in layer.parameters(recurse=False) if p.ndim > 1]
            others[f"'{name}' ({type(layer).__name__})"] = sum(own)
    if (left := sum(others.values())) > FEW * (packed + left):
        raise UserError(
            f"source.bits = 4 packs linear layers, and {100 * left / (packed + left):.0f} % of the "
            f"weights that it should are elsewhere, as in {max(others, key=others.__getitem__)}: "
            "leave source.bits out"
        )
    return found


def replace_packed(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``make(layer)`` in the place of each layer that a 4-bit base packs."""
    for name, layer in packed_layers(model):
        model.set_submodule(name, make(layer))


class _Product(torch.autograd.Function):
    """``x @ W.T + b``; the backward pass and the tangent unpack W again and save nothing, so that a
    block which ends with it needn't run it again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layer: PackedLinear) -> Tensor:
        return F.linear(x, layer.unpacked(x.dtype), layer.bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return F.linear(tangent, ctx.layer.unpacked(tangent.dtype))
