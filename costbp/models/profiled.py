"""A configuration's model as somebody's training loop holds it: what a profile says of the model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from costbp.config.catalog import ModelEntry
from costbp.config.profiles import Profile
from costbp.config.sources import ConfigSource
from costbp.config.trainables import LoraTraining, VirtualTokens
from costbp.errors import UserError
from costbp.models.architecture import transformers_config
from costbp.models.build import finished
from costbp.models.four_bit import TracedFourBit
from costbp.models.loss import (
    PartedHead,
    cross_entropy,
    parted_cross_entropy,
    shifted_cross_entropy,
)
from costbp.models.modules import Transformer
from costbp.models.packed import replace_packed
from costbp.models.weights import randomly_drawn
from costbp.objective import Objective


def build_profiled(entry: ModelEntry, profile: Profile, classes: int) -> Objective:
    """The objective of a model in training mode under a profile, on meta.

    Raises:
        UserError: the model can't have a setting of the profile.
    """
    source = entry.source
    assert isinstance(source, ConfigSource)
    if source.loss_chunk is not None:
        raise UserError(
            f"source.loss_chunk is of this package's loop, and profile '{profile.label}' has its own "
            "way with logits: leave it out"
        )
    if source.attention == "sdpa":
        source = source.model_copy(update={"attention": profile.attention})
    config = transformers_config(source.config, classes)
    if source.form == "classifier" and config.pad_token_id is None:
        config.pad_token_id = 0
    if not profile.ties:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if profile.fused_gelu and getattr(config, "hidden_act", "") == "gelu_new":
        config.hidden_act = "gelu_pytorch_tanh"
    base = randomly_drawn(source, config)
    dtype = next(base.parameters()).dtype
    if source.bits is not None:
        _pack(base, profile)
    made = finished(base, source.form, entry.train, classes)
    if profile.adapters == "base":
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    loss: Any = cross_entropy
    if profile.chunk or profile.chunks:
        made = _parted(made, entry, profile)
        loss = partial(parted_cross_entropy, upcast=profile.upcast)
    if profile.shifts == "logits" and source.form != "classifier":
        loss = shifted_cross_entropy
    return Objective(made.train(), loss)


def _pack(base: Any, profile: Profile) -> None:
    kind = profile.four_bit
    make = partial(TracedFourBit, kind=kind)
    replace_packed(base, make)
    head = base.get_output_embeddings()
    if kind.head == "packed" and head is not None:
        name = next(name for name, module in base.named_modules() if module is head)
        base.set_submodule(name, make(head))
    if kind.float32:
        for parameter in base.parameters():
            parameter.data = parameter.data.to(torch.float32)


def _parted(made: nn.Module, entry: ModelEntry, profile: Profile) -> nn.Module:
    if not isinstance(made, Transformer) or not made.vocabulary:
        raise UserError(
            f"profile '{profile.label}' makes logits in parts, and a classifier has none"
        )
    whole: Any = made.model
    if isinstance(entry.train, VirtualTokens):
        raise UserError(
            f"profile '{profile.label}' makes logits in parts, without the tokens of train.kind "
            f"'{entry.train.kind}'"
        )
    if isinstance(entry.train, LoraTraining):
        whole = whole.get_base_model()
    at_once = profile.chunk is not None
    places = profile.chunk or profile.chunks or 1
    head = _capped(whole)
    return PartedHead(whole.get_decoder(), head, made.vocabulary, places=places, at_once=at_once)


def _capped(whole: Any) -> nn.Module:
    """The head, and the soft limit of logits that some models put behind it."""
    head: nn.Module = whole.get_output_embeddings()
    limit = getattr(whole.config.get_text_config(), "final_logit_softcapping", None)
    return head if limit is None else nn.Sequential(head, _Limited(limit))


class _Limited(nn.Module):
    """limit tanh(x / limit)."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / self.limit) * self.limit
