"""Models from a configuration in the hub's format: any family, any size, in the study's form."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import ConfigSource, FullTraining, HeadTraining, LoraTraining
from costbp.errors import UserError
from costbp.models.loss import ChunkedLoss, already, cross_entropy
from costbp.models.quantised import QuantisedLinear
from costbp.objective import Batch, Objective

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
HEADS = ("classifier", "score", "lm_head")  # trained in full beside adapters, never quantised
PATCHES = 20  # a side of an image
VISION = "visual"  # tower that the 4-bit releases leave as it is
Training = LoraTraining | HeadTraining | FullTraining


class Transformer(nn.Module):
    """A transformers model called with a batch; returns logits.

    Args:
        vocabulary: width of the logits of a language model; 0 for a classifier.
    """

    def __init__(self, model: nn.Module, vocabulary: int = 0) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits


def transformers_config(values: Mapping[str, Any], classes: int = 4) -> Any:
    """A configuration in the hub's format as transformers understands it; no cache of keys.

    Raises:
        UserError: ``model_type`` is missing or unknown, or a size is missing, for which
            transformers would silently take another model's.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(values)
    kind = values.pop("model_type", None)
    if kind is None:
        raise UserError("configuration: 'model_type' is missing")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"configuration: model_type = '{kind}' is unknown to transformers{hint}")
    sizes = values.get("text_config", values)
    missing = [name for name in REQUIRED if name not in sizes]
    if missing:
        raise UserError(
            f"configuration of a '{kind}' model: {', '.join(missing)} missing "
            f"(needed: {', '.join(REQUIRED)})"
        )
    try:
        config = AutoConfig.for_model(kind, **values, num_labels=classes)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"configuration of a '{kind}' model: {error}") from error
    config.use_cache = config.get_text_config().use_cache = False
    return config


def longest(config: Any) -> int:
    """Tokens that the model has positions for."""
    text = config.get_text_config()
    offset = 2 if text.model_type == "roberta" else 0  # its positions begin after the padding's
    limit: int = text.max_position_embeddings
    return limit - offset


def build_full_size(
    source: ConfigSource,
    train: Training,
    classes: int = 4,
    *,
    attention: str = "eager",
    adapters_at_zero: bool = True,
) -> Objective:
    """The objective of a model on the current default device, in training mode, random weights.

    Trained parameters are float32 whatever the base's dtype is, as peft keeps them.

    Args:
        classes: of a classifier.
        attention: ``eager``, or ``sdpa`` for the fused kernel, which is not counted on a CPU.
        adapters_at_zero: start LoRA's second factor at zero, as in training.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    forms: dict[str, Any] = {
        "classifier": AutoModelForSequenceClassification,
        "causal": AutoModelForCausalLM,
        "image_text": AutoModelForImageTextToText,
    }
    config = transformers_config(source.config, classes)
    if source.form == "classifier" and config.pad_token_id is None:
        config.pad_token_id = 0  # where a sequence ends, which a decoder's classifier looks for
    model = forms[source.form].from_config(
        config, attn_implementation=attention, dtype=getattr(torch, source.dtype)
    )
    if source.bits is not None:
        if isinstance(train, FullTraining):
            raise UserError(
                "source.bits = 4: a packed base can't be trained in full; use train lora"
            )
        _quantise(model, source.group)
    model = _trainable(model, source.form, train, adapters_at_zero)
    vocabulary = 0 if source.form == "classifier" else config.get_text_config().vocab_size
    if source.loss_chunk is None or not vocabulary:
        return Objective(Transformer(model, vocabulary).train(), cross_entropy)
    whole: Any = model.get_base_model() if isinstance(train, LoraTraining) else model  # type: ignore[operator]
    head = whole.get_output_embeddings()
    chunked = ChunkedLoss(whole.model, head, source.loss_chunk, vocabulary)
    return Objective(chunked.train(), already)


def _quantise(model: nn.Module, group: int) -> None:
    """Replace the linear layers of the language model's blocks."""
    for name, layer in list(model.named_modules()):
        parts = name.split(".")
        if type(layer) is nn.Linear and not {*HEADS, VISION} & set(parts):
            parent = model.get_submodule(".".join(parts[:-1]))
            setattr(parent, parts[-1], QuantisedLinear(layer, group))


def _trainable(model: Any, form: str, train: Training, adapters_at_zero: bool) -> nn.Module:
    if isinstance(train, FullTraining):
        return model
    model.requires_grad_(False)
    head = next((name for name in HEADS if hasattr(model, name)), "")
    if isinstance(train, HeadTraining):
        if form == "classifier":
            getattr(model, head).requires_grad_(True)
        else:  # untied from the embedding, which stays frozen
            output = model.get_output_embeddings()
            output.weight = nn.Parameter(output.weight.detach().clone())
        return _in_float32(model)
    from peft import LoraConfig, get_peft_model

    try:
        model = get_peft_model(
            model,
            LoraConfig(
                r=train.rank,
                lora_alpha=train.alpha,  # type: ignore[arg-type]
                lora_dropout=train.dropout,
                target_modules=list(train.targets),
                modules_to_save=[head] if form == "classifier" else None,
                init_lora_weights=adapters_at_zero,
            ),
        )
    except ValueError as error:
        raise UserError(
            f"train.targets = {list(train.targets)} match no layer of {type(model).__name__}"
        ) from error
    return _in_float32(model)


def _in_float32(model: nn.Module) -> nn.Module:
    """Trained parameters in float32; a head that is trained gets its input in float32, too."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in own:
            if parameter.dtype != torch.float32 and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if own and type(module) is nn.Linear:
            module.register_forward_pre_hook(_cast_input)
    return model


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = module.weight
    return (inputs[0].to(weight.dtype), *inputs[1:])


def sample_batch(config: Any, form: str, batch: int, length: int, classes: int = 4) -> Batch:
    """Random tokens [batch, length], a quarter of the first row padding, and labels: of classes, or
    the tokens themselves. For image-text models each row has an image: of 20 x 20 patches, which
    take 100 tokens where four patches make one, or less so that half of the row is left for text.

    Raises:
        UserError: longer than the model's positions, or too short for any image.
    """
    if length > longest(config):
        raise UserError(f"length {length} exceeds the model's maximum of {longest(config)} tokens")
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(10, vocabulary, (batch, length), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, length - length // 4 :] = 0
    data = {"input_ids": ids, "attention_mask": mask}
    if form == "image_text":
        data |= _image(config, ids)
    if form == "classifier":
        labels = torch.randint(0, classes, (batch,), generator=generator, device="cpu")
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {**data, "labels": labels}


def _image(config: Any, ids: Tensor) -> dict[str, Tensor]:
    vision = config.vision_config
    rows, length = ids.shape
    side = min(PATCHES // vision.spatial_merge_size, math.isqrt(max(0, length // 2 - 2)))
    if side < 1:
        raise UserError(f"length {length} is too short for an image and its two marks: 6 at least")
    grid, tokens = side * vision.spatial_merge_size, side * side
    ids[ids == config.image_token_id] = 10
    ids[:, 0] = config.vision_start_token_id
    ids[:, 1 : tokens + 1] = config.image_token_id
    ids[:, tokens + 1] = config.vision_end_token_id
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(rows * grid * grid, width),
        "image_grid_thw": torch.tensor([[1, grid, grid]], device="cpu").repeat(rows, 1),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }
