"""Configurations in the hub's format: what a model's sizes are, and random batches that fit it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from costbp.errors import UserError
from costbp.objective import Batch

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
    own = CONFIG_MAPPING[kind].attribute_map  # GPT-2 says n_embd
    missing = [name for name in REQUIRED if name not in sizes and own.get(name) not in sizes]
    if missing:
        raise UserError(
            f"configuration of a '{kind}' model: {', '.join(missing)} missing "
            f"(needed: {', '.join(REQUIRED)})"
        )
    try:
        config = AutoConfig.for_model(kind, **values, num_labels=classes)
    except Exception as error:  # of transformers, by model
        raise UserError(
            f"configuration of a '{kind}' model: {' '.join(str(error).split())}"
        ) from error
    config.use_cache = config.get_text_config().use_cache = False
    return config


def longest(values: Mapping[str, Any]) -> int | None:
    """Tokens that a model of this configuration has positions for; None where it doesn't say."""
    text = values.get("text_config", values)
    found = text.get("max_position_embeddings", text.get("n_positions"))
    if found is None:
        return None
    return int(found) - (2 if values.get("model_type") == "roberta" else 0)  # they begin at two


def sample_batch(
    config: Any, form: str, batch: int, length: int, classes: int = 4, padding: bool = True
) -> Batch:
    """Random tokens [batch, length], a quarter of the first row padding, and labels: of classes, or
    the tokens themselves. Without ``padding`` there is no mask of it either. For image-text models each
    row has an image: of 20 x 20 patches, which take 100 tokens where four patches make one, or less so
    that half of the row is left for text.

    Raises:
        UserError: longer than the model's positions, or too short for any image.
    """
    limit = longest(config.to_dict())
    if limit is not None and length > limit:
        raise UserError(f"length {length} exceeds the model's maximum of {limit} tokens")
    generator = torch.Generator().manual_seed(0)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(10, vocabulary, (batch, length), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    if batch > 1 and padding:
        mask[0, length - length // 4 :] = 0
    data = {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}
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
