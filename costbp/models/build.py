"""From a catalog entry to a module whose trainable parameters are exactly those to be trained."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import (
    AssetSource,
    ConfigSource,
    HeadTraining,
    LoraTraining,
    ModelEntry,
    RandomSource,
)
from costbp.errors import UserError
from costbp.models.tokenizer import Tokenizer, hashed, pretrained
from costbp.objective import Batch

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout")


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


POOLINGS = {"mean": mean_pool, "first": first_pool, "last": last_pool}


class Head(nn.Module):
    """A linear classifier on features; returns logits [n, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> Tensor:
        return self.classifier(batch["features"])


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

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(encoder.width, classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.head({"features": self.encoder(batch)})


def asset_folder(source: AssetSource, assets: Path) -> Path:
    """The transformers folder of an asset source.

    Raises:
        UserError: the asset has not been fetched.
    """
    folder = assets / source.asset / source.folder
    if not (folder / "config.json").is_file():
        raise UserError(f"model asset '{source.asset}' is not in {assets}; run `costbp assets`")
    return folder


def load_tokenizer(model: ModelEntry, assets: Path) -> Tokenizer:
    """The tokenizer that belongs to a model."""
    assert not isinstance(model.source, ConfigSource), "a study with such a model isn't loaded"
    if isinstance(model.source, RandomSource):
        return hashed(int(model.source.config["vocab_size"]))
    return pretrained(asset_folder(model.source, assets))


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection while transformers and peft are imported: there is no garbage then, and
    looking for it takes a fifth of the ten seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def load_encoder(model: ModelEntry, assets: Path) -> Encoder:
    """The base model, all of it trainable; eager attention, since the fused kernel has no
    forward-mode rule and is not seen by the FLOP counter."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    source = model.source
    assert not isinstance(source, ConfigSource), "a study with such a model isn't loaded"
    if isinstance(source, RandomSource):
        config = AutoConfig.for_model(source.model_type, **source.config)
    else:
        config = AutoConfig.from_pretrained(asset_folder(source, assets), local_files_only=True)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, model.dropout)
    config.use_cache = False
    eager: dict[str, Any] = {"config": config, "attn_implementation": "eager"}
    if isinstance(source, RandomSource):
        torch.manual_seed(source.seed)
        return Encoder(AutoModel.from_config(**eager), model.pooling)
    folder = asset_folder(source, assets)
    loaded = AutoModel.from_pretrained(folder, local_files_only=True, **eager)
    return Encoder(loaded, model.pooling)


@torch.no_grad()
def features(encoder: Encoder, batch: Batch) -> Tensor:
    """What the frozen base hands to a head, [n, hidden]."""
    return encoder.eval()(batch)


@_without_collection()
def _lora(model: ModelEntry, classes: int, assets: Path, seed: int, width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    training = model.train
    assert isinstance(training, LoraTraining)
    encoder = load_encoder(model, assets)
    torch.manual_seed(seed)
    try:
        encoder.model = get_peft_model(
            encoder.model,
            LoraConfig(
                r=training.rank,
                lora_alpha=training.alpha,  # type: ignore[arg-type]
                lora_dropout=training.dropout,
                target_modules=list(training.targets),
            ),
        )
    except ValueError as error:
        raise UserError(
            f"models.yaml: train.targets = {list(training.targets)} match no layer of "
            f"{type(encoder.model).__name__}"
        ) from error
    return Classifier(encoder, classes)


def _head(model: ModelEntry, classes: int, assets: Path, seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return Head(width, classes)


BUILDERS: dict[type, Callable[..., nn.Module]] = {LoraTraining: _lora, HeadTraining: _head}


def build_model(model: ModelEntry, classes: int, assets: Path, seed: int, width: int) -> nn.Module:
    """The module to be trained, in training mode; adapters and head are drawn from ``seed``.

    Args:
        width: length of a cached feature vector; 0 where the model reads tokens.
    """
    return BUILDERS[type(model.train)](model, classes, assets, seed, width).train()
