"""Four-bit bases in the formats of others: NF4 of bitsandbytes, and checkpoints that GPTQ made."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import Held
from costbp.errors import UserError
from costbp.models.quantised import PackedLinear, QuantisedLinear, replace_packed

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


def pack(model: nn.Module, held: Held) -> None:
    """Pack the linear layers of a model that is there in full.

    Raises:
        UserError: the format can't be made from full weights, or its library is missing.
    """
    if held.packing == "gptq":
        raise UserError(
            "source.packing = 'gptq' reads a checkpoint that GPTQ made, which this is not; use "
            "packing rtn or nf4"
        )
    make: Any = partial(QuantisedLinear, group=held.group) if held.packing == "rtn" else Nf4Linear
    replace_packed(model, make)


GPTQ = "costbp_gptq"


def gptq_reader(settings: dict[str, Any]) -> Any:
    """A quantisation configuration for ``from_pretrained`` that puts ``GptqLinear`` in the place of
    the layers a checkpoint holds packed.

    Args:
        settings: ``quantization_config`` of the checkpoint's config.json.

    Raises:
        UserError: it isn't 4-bit GPTQ.
    """
    if settings.get("quant_method") != "gptq" or settings.get("bits") != 4:
        raise UserError(
            f"quantization_config: quant_method = {settings.get('quant_method')!r}, "
            f"bits = {settings.get('bits')!r}; packing gptq reads 4-bit GPTQ"
        )
    configuration, _ = _registered()
    return configuration(
        group=int(settings.get("group_size", 128)),
        less_one=settings.get("checkpoint_format", "gptq") == "gptq",
    )


def _registered() -> tuple[Any, Any]:
    """The library's hooks for a format of one's own; once a process."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if GPTQ in AUTO_QUANTIZER_MAPPING:
        return AUTO_QUANTIZATION_CONFIG_MAPPING[GPTQ], AUTO_QUANTIZER_MAPPING[GPTQ]

    @register_quantization_config(GPTQ)
    class Configuration(QuantizationConfigMixin):
        def __init__(self, group: int = 128, less_one: bool = True, **_: Any) -> None:
            self.quant_method: Any = GPTQ
            self.group, self.less_one = group, less_one

    @register_quantizer(GPTQ)
    class Reader(HfQuantizer):
        requires_calibration = False
        is_trainable = True

        def is_serializable(self) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
            config: Any = self.quantization_config
            with torch.device("meta"):
                make = partial(GptqLinear, group=config.group, less_one=config.less_one)
                replace_packed(model, make)
            return model

    return Configuration, Reader
