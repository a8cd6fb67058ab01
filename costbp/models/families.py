"""The five architectures of the study with random weights, at any size: what tests, benchmarks and
cost tracing run where no weights are at hand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from costbp.models.loss import cross_entropy
from costbp.objective import Batch, Objective

Train = Literal["lora", "head", "full"]
FAMILIES = ("bert", "roberta", "opt", "llama", "qwen2_vl")
CLASSIFIERS = ("bert", "roberta")
VOCABULARY = 512
IMAGE_TOKEN, VISION_START, VISION_END = 5, 6, 7
PATCH = 14  # pixels; four patches make one image token


class Transformer(nn.Module):
    """A transformers model called with a batch; returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.model(**inputs).logits
        return logits


def _config(family: str, hidden: int, layers: int, heads: int, inner: int, vocabulary: int) -> Any:
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 4}
    if family in CLASSIFIERS:
        extra = {"intermediate_size": inner, "max_position_embeddings": 600, **quiet}
        if family == "roberta":
            extra["classifier_dropout"] = 0.0
    elif family == "opt":
        extra = {
            "ffn_dim": inner,
            "word_embed_proj_dim": hidden,
            "max_position_embeddings": 600,
            "dropout": 0.0,
        }
    else:
        extra = {"intermediate_size": inner, "num_key_value_heads": max(1, heads // 2)}
    if family != "qwen2_vl":
        return AutoConfig.for_model(family, **common, **extra)
    width = hidden // heads
    rope = {"rope_type": "default", "mrope_section": [width // 8, 3 * width // 16, 3 * width // 16]}
    return AutoConfig.for_model(
        "qwen2_vl",
        text_config={**common, **extra, "rope_parameters": {**rope, "rope_theta": 10000.0}},
        vision_config={
            "depth": max(1, layers // 2),
            "embed_dim": hidden,
            "hidden_size": hidden,
            "num_heads": heads,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def family_model(
    family: str,
    *,
    train: Train = "lora",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    inner: int | None = None,
    vocabulary: int = VOCABULARY,
    rank: int = 1,
    dropout: float = 0.0,
    attention: str = "eager",
    seed: int = 0,
) -> Transformer:
    """A model of one of ``FAMILIES``, in training mode: a classifier with four classes for the
    encoders, a language model for the decoders.

    Args:
        train: adapters on the queries and values (and a classifier's head), the head alone, or
            every parameter.
        hidden, layers, heads, inner: sizes; ``inner`` of the feed-forward part, 4 x hidden if
            None.
        dropout: of the adapters.
        attention: ``eager``, or ``sdpa`` for the fused kernel.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind: Any = AutoModelForCausalLM
    if family in CLASSIFIERS:
        kind = AutoModelForSequenceClassification
    elif family == "qwen2_vl":
        kind = AutoModelForImageTextToText
    config = _config(family, hidden, layers, heads, inner or 4 * hidden, vocabulary)
    config.use_cache = config.get_text_config().use_cache = False
    torch.manual_seed(seed)
    model = kind.from_config(config, attn_implementation=attention)
    return Transformer(_trainable(model, family, train, rank, dropout)).train()


def _trainable(model: Any, family: str, train: Train, rank: int, dropout: float) -> nn.Module:
    if train == "full":
        return model
    if train == "head":
        model.requires_grad_(False)
        if family in CLASSIFIERS:
            model.classifier.requires_grad_(True)
        else:  # untied from the embedding, which stays frozen
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["query", "value"] if family in CLASSIFIERS else ["q_proj", "v_proj"]
    saved = ["classifier"] if family in CLASSIFIERS else None
    lora = LoraConfig(
        r=rank,
        lora_alpha=1,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=saved,
        init_lora_weights=False,  # B is not zero, so that every adapter has a gradient
    )
    adapted: nn.Module = get_peft_model(model, lora)
    return adapted


def family_batch(
    family: str, batch: int = 2, length: int = 24, vocabulary: int = VOCABULARY
) -> Batch:
    """Random tokens [batch, length] with some padding, labels, and for Qwen2-VL an image of 4 x 4
    patches (4 tokens) a row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, length - length // 4 :] = 0
    data = {"input_ids": ids, "attention_mask": mask}
    if family == "qwen2_vl":
        ids[:, 0], ids[:, 1:5], ids[:, 5] = VISION_START, IMAGE_TOKEN, VISION_END
        data["pixel_values"] = torch.randn(batch * 16, 3 * 2 * PATCH**2, generator=generator)
        data["image_grid_thw"] = torch.tensor([[1, 4, 4]]).repeat(batch, 1)
        data["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if family in CLASSIFIERS:
        labels = torch.randint(0, 4, (batch,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {**data, "labels": labels}


def family_objective(family: str, **options: Any) -> Objective:
    """The objective of ``family_model(family, **options)``."""
    return Objective(family_model(family, **options), cross_entropy)
