"""The five architectures of the study with random weights, at any size: what tests and benchmarks
run where no weights are at hand."""

from __future__ import annotations

from typing import Any, Literal

import torch

from costbp.config.catalog import ConfigSource
from costbp.config.trainables import FullTraining, HeadTraining, LoraTraining, Training
from costbp.models.architecture import sample_batch, transformers_config
from costbp.models.build import build_from_config
from costbp.objective import Batch, Objective

Train = Literal["lora", "head", "full"]
FAMILIES = ("bert", "roberta", "opt", "llama", "qwen2_vl")
CLASSIFIERS = ("bert", "roberta")
VOCABULARY = 512
POSITIONS = 600


def family_source(
    family: str,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    inner: int | None = None,
    vocabulary: int = VOCABULARY,
) -> ConfigSource:
    """One of ``FAMILIES`` in float32 without dropout, at any size: a classifier for the encoders, a
    language model for the decoders. ``inner`` of the feed-forward part is 4 x hidden if None."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
    }
    inner = inner or 4 * hidden
    form = "causal"
    if family in CLASSIFIERS:
        form = "classifier"
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = {**common, **quiet, "intermediate_size": inner}
    elif family == "opt":
        config = {**common, "ffn_dim": inner, "word_embed_proj_dim": hidden, "dropout": 0.0}
    else:
        config = {**common, "intermediate_size": inner, "num_key_value_heads": max(1, heads // 2)}
    if family == "qwen2_vl":
        form = "image_text"
        config = _with_vision(config)
    return ConfigSource(
        kind="config", form=form, dtype="float32", config={"model_type": family, **config}
    )


def _with_vision(text: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    width = hidden // heads
    rope = {"rope_type": "default", "mrope_section": [width // 8, 3 * width // 16, 3 * width // 16]}
    return {
        "text_config": {**text, "rope_parameters": {**rope, "rope_theta": 10000.0}},
        "vision_config": {
            "depth": max(1, text["num_hidden_layers"] // 2),
            "embed_dim": hidden,
            "hidden_size": hidden,
            "num_heads": heads,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        "image_token_id": 5,
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
    }


def family_objective(
    family: str,
    *,
    train: Train = "lora",
    rank: int = 1,
    dropout: float = 0.0,
    attention: Literal["sdpa", "eager"] = "sdpa",
    seed: int = 0,
    **sizes: Any,
) -> Objective:
    """The objective of one of ``FAMILIES``, in training mode; a classifier has four classes.

    Args:
        train: adapters on the queries and values (and a classifier's head), the head alone, or
            every parameter. Adapters start away from zero, so that each has a gradient.
        dropout: of the adapters.
        attention: ``sdpa``, fused, or ``eager``.
        sizes: of ``family_source``.
    """
    targets = ("query", "value") if family in CLASSIFIERS else ("q_proj", "v_proj")
    kinds: dict[str, Training] = {
        "lora": LoraTraining(kind="lora", rank=rank, alpha=1, dropout=dropout, targets=targets),
        "head": HeadTraining(kind="head"),
        "full": FullTraining(kind="full"),
    }
    torch.manual_seed(seed)
    source = family_source(family, **sizes).model_copy(update={"attention": attention})
    return build_from_config(source, kinds[train], adapters_at_zero=False)


def family_batch(
    family: str, batch: int = 2, length: int = 24, vocabulary: int = VOCABULARY
) -> Batch:
    """Random tokens [batch, length] with some padding, labels, and for Qwen2-VL an image a row."""
    source = family_source(family, vocabulary=vocabulary)
    return sample_batch(transformers_config(source.config), source.form, batch, length)
