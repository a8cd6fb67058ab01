"""Modules that are called with a batch: what the catalog's forms put out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costbp.objective import Batch

SPREAD = 0.02  # of a head's first weights, as in BERT, RoBERTa and OPT
SHARPNESS = 10.0  # of label words: cosines become logits


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states [n, length, hidden] over real tokens, [n, hidden]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


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
    """A transformers model whose hidden states are averaged; returns features [n, hidden]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.width: int = model.config.hidden_size

    def forward(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states = self.model(**inputs).last_hidden_state
        return mean_pool(states, batch["attention_mask"])


class LabelWords(nn.Module):
    """A frozen head on features: each class is the embedding of its description; returns logits
    [n, classes], cosines of what features and embeddings have beyond the embeddings' mean, times
    ``SHARPNESS``. So a task is put as the encoder's own, and the first parameters answer already.

    Args:
        words: features of the descriptions, [classes, hidden].
    """

    center: Tensor
    words: Tensor

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        center = words.mean(0)
        self.register_buffer("center", center)
        self.register_buffer("words", F.normalize(words - center, dim=-1))

    def forward(self, batch: Batch) -> Tensor:
        found = F.normalize(batch["features"] - self.center, dim=-1)
        return SHARPNESS * F.linear(found, self.words)


class Classifier(nn.Module):
    """A module that returns features, of a known ``width``, and a head: a linear one, unless it is
    given; returns logits [n, classes]."""

    def __init__(self, encoder: Any, classes: int, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head or Head(encoder.width, classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.head({"features": self.encoder(batch)})


class Transformer(nn.Module):
    """A transformers model with a head of its own; returns logits.

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


def redraw(head: nn.Module) -> None:
    """Draw the linear layers of a classifier's head anew, on the CPU whatever their device."""
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            drawn = torch.empty_like(layer.weight, device="cpu")
            layer.weight.data.copy_(nn.init.normal_(drawn, std=SPREAD))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
