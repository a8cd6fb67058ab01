"""From a catalog entry to a module whose trainable parameters are exactly those to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import FullTraining, ModelEntry
from costbp.models.fusion import Fusion, VisionEncoder
from costbp.models.trainable import HEADS, Transformer, trainable
from costbp.models.weights import load_base, vision_file, without_collection
from costbp.objective import Batch


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states [n, length, hidden] over real tokens, [n, hidden]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def first_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of the first token, [n, hidden]."""
    return states[:, 0]


def last_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of the last real token, [n, hidden]."""
    last = mask.sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


SPREAD = 0.02  # of a head's first weights, as in BERT, RoBERTa and OPT
POOLINGS = {"mean": mean_pool, "first": first_pool, "last": last_pool}


class Head(nn.Module):
    """A linear classifier on features; returns logits [n, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=SPREAD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(batch["features"].to(self.classifier.weight.dtype))


class Encoder(nn.Module):
    """A transformers model and a pooling; returns features [n, hidden]."""

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model, self.pool = model, POOLINGS[pooling]
        self.width: int = model.config.hidden_size  # type: ignore[assignment, union-attr]

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        states = self.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return self.pool(states, mask)


class Classifier(nn.Module):
    """An encoder with a linear head; returns logits [n, classes]."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(encoder.width, classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.head({"features": self.encoder(batch)})


def load_encoder(model: ModelEntry, assets: Path) -> Encoder:
    """The base model of form ``encoder``, all of it trainable."""
    return Encoder(load_base(model, assets), model.pooling)


@torch.no_grad()
def features(encoder: Encoder, batch: Batch) -> Tensor:
    """What the frozen base hands to a head, [n, hidden], in float32."""
    return encoder.eval()(batch).float()


@without_collection()
def build_model(
    model: ModelEntry,
    classes: int,
    assets: Path,
    seed: int,
    width: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The module to be trained, in training mode; adapters and head are drawn from ``seed``, on the
    CPU whatever the device.

    Args:
        classes: 0 where answers are free text.
        width: length of a cached feature vector; 0 where the model reads tokens.
        device: where all of it ends.

    Raises:
        UserError: weights are missing or not readable.
    """
    if width:
        torch.manual_seed(seed)
        return Head(width, classes).train().to(device)
    source = model.source
    where = "cpu" if source.form == "fusion" else device  # what is drawn depends on its embedding
    base: Any = load_base(model, assets, classes if source.form == "classifier" else 0, where)
    torch.manual_seed(seed)
    if model.writes_text or source.form == "classifier":
        if source.form == "classifier":
            _draw(base)
        vocabulary = base.config.get_text_config().vocab_size if model.writes_text else 0
        adapted = trainable(base, source.form, model.train)
        return Transformer(adapted, vocabulary).train().to(device)
    if isinstance(model.train, FullTraining) and getattr(base, "pooler", None) is not None:
        base.pooler.requires_grad_(False)  # its output is not read
    adapted = trainable(base, source.form, model.train)
    if source.form == "fusion":
        vision = VisionEncoder(vision_file(model, assets))
        fusion = Fusion(adapted, vision, POOLINGS[model.pooling])
        return Classifier(fusion, classes).train().to(device)
    return Classifier(Encoder(adapted, model.pooling), classes).train().to(device)


def _draw(base: Any) -> None:
    """A classifier's head anew, from the current seed."""
    head = next(getattr(base, name) for name in HEADS if hasattr(base, name))
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            drawn = torch.empty_like(layer.weight, device="cpu")
            layer.weight.data.copy_(nn.init.normal_(drawn, std=SPREAD))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
