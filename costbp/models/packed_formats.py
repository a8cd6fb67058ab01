"""Four-bit bases in the formats of others: NF4 of bitsandbytes, and checkpoints that GPTQ made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from costbp.errors import UserError
from costbp.models.quantised import PackedLinear, QuantisedLinear

NF4_BLOCK = 64  # weights that share a scale (Dettmers et al. 2023, section 3)
PER_WORD = 8  # 4-bit values in a 32-bit word


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


def packer(
    packing: str, group: int, *, less_one: bool = True
) -> Callable[[nn.Linear], PackedLinear]:
    """Makes the packed layer of a linear one, whose weight may be on meta.

    Args:
        packing: as in the catalog.
        group: weights that share a scale; not of nf4.
        less_one: see ``GptqLinear``.
    """
    made: dict[str, Callable[[nn.Linear], PackedLinear]] = {
        "rtn": partial(QuantisedLinear, group=group),
        "nf4": Nf4Linear,
        "gptq": partial(GptqLinear, group=group, less_one=less_one),
    }
    return made[packing]
