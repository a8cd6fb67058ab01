"""Packed layers in ``from_pretrained``: read from a checkpoint that holds them, or made of full
weights while these are read, a tensor at a time. Importing this file registers them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from costbp.config.sources import Source
from costbp.errors import UserError
from costbp.models.packed import (
    GptqLinear,
    Nf4Linear,
    QuantisedLinear,
    is_packed,
    packed_layers,
    replace_packed,
)

METHOD = "costbp"
TRIM = 2**26  # bytes of weights after which memory goes back to the system


def packing_of(source: Source, stored: dict[str, Any] | None) -> Any:
    """How a base is packed; None where it isn't. ``from_pretrained(quantization_config=packing)`` packs
    full weights as they are read, ``config.quantization_config = packing.to_dict()`` reads packed ones.

    Args:
        stored: ``quantization_config`` of the checkpoint's config.json.

    Raises:
        UserError: the checkpoint isn't packed as the entry says.
    """
    if stored is None:
        if source.bits is not None and source.packing == "gptq":
            raise UserError(
                "packing gptq reads a checkpoint that GPTQ made, and this is none; use rtn or nf4"
            )
        return None if source.bits is None else Packing(source.packing, source.group)
    method, bits = stored.get("quant_method"), stored.get("bits")
    if source.bits is None or source.packing != "gptq":
        raise UserError(f"the weights are packed ({method}); set source.bits = 4 and packing gptq")
    if method != "gptq" or bits != 4:
        raise UserError(
            f"quant_method = {method!r}, bits = {bits!r}; packing gptq reads 4-bit GPTQ"
        )
    less_one = stored.get("checkpoint_format", "gptq") == "gptq"
    return Packing("gptq", int(stored.get("group_size", 128)), less_one)


@register_quantization_config(METHOD)
class Packing(QuantizationConfigMixin):
    """How layers are packed: see ``packing`` and ``group`` of a source, and ``GptqLinear``."""

    def __init__(self, packing: str, group: int, less_one: bool = True, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.packing, self.group, self.less_one = packing, group, less_one

    def packer(self) -> Callable[[nn.Linear], nn.Module]:
        """Makes the packed layer of a linear one, whose weight may be on meta."""
        if self.packing == "nf4":
            return Nf4Linear
        if self.packing == "gptq":
            return partial(GptqLinear, group=self.group, less_one=self.less_one)
        return partial(QuantisedLinear, group=self.group)


@register_quantizer(METHOD)
class Packer(HfQuantizer):
    """Puts packed layers into a model that is on meta, or in the place of each layer that is read."""

    requires_calibration = False
    is_trainable = True

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.make, self.seen = quantization_config.packer(), 0

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        with torch.device("meta"):  # sizes that don't fit are refused before anything is read
            made = [(name, self.make(layer)) for name, layer in packed_layers(model)]
        for name, layer in made if self.pre_quantized else ():
            model.set_submodule(name, layer)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        name, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and is_packed(name, model.get_submodule(name))

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        replace_packed(model, self.make)  # layers that the checkpoint doesn't hold
        return model


class _Pack(ConversionOps):
    """Takes a layer's weight from the loader and puts the packed layer in its place."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **rest: Any,
    ) -> dict[str, list[Tensor]]:
        ((weight,),) = input_dict.values()
        model, name = rest["model"], rest["full_layer_name"].removesuffix(".weight")
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, self.packer.make(layer))
        rest["missing_keys"].discard(rest["full_layer_name"])
        self.packer.seen += weight.nbytes
        if self.packer.seen > TRIM:
            self.packer.seen = 0
            _trim()
        return {}


def _trim() -> None:
    """Freed memory back to the system: in glibc's heap the packed tensors lie between holes, which
    add up to several times the full weights."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
