"""Models from a configuration in the hub's format: any family, any size, in the study's form."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from costbp.config.catalog import ConfigSource, FullTraining, LoraTraining
from costbp.errors import UserError
from costbp.models.loss import ChunkedLoss, already, cross_entropy
from costbp.models.quantised import QuantisedLinear, replace_packed
from costbp.models.trainable import Training, Transformer, trainable
from costbp.models.weights import quiet
from costbp.objective import Batch, Objective

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
PATCHES = 20  # a side of an image


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

    quiet()
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
        replace_packed(model, partial(QuantisedLinear, group=source.group))
    model = trainable(model, source.form, train, adapters_at_zero=adapters_at_zero)
    vocabulary = 0 if source.form == "classifier" else config.get_text_config().vocab_size
    if source.loss_chunk is None or not vocabulary:
        return Objective(Transformer(model, vocabulary).train(), cross_entropy)
    whole: Any = model.get_base_model() if isinstance(train, LoraTraining) else model  # type: ignore[operator]
    head = whole.get_output_embeddings()
    chunked = ChunkedLoss(whole.model, head, source.loss_chunk, vocabulary)
    return Objective(chunked.train(), already)


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
