"""The repeated blocks of an encoder: which are trained, and the states that those below put out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.trainables import FullTraining, LoraTraining, Training
from costbp.errors import UserError
from costbp.objective import Batch


def stack(model: nn.Module) -> nn.ModuleList:
    """The longest list of a model's blocks.

    Raises:
        UserError: it has none.
    """
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not found:
        raise UserError(f"train.blocks: {type(model).__name__} has no list of blocks")
    return max(found, key=len)


def places(train: LoraTraining | FullTraining, count: int) -> list[int]:
    """Indices from 0 of the trained blocks, of ``count``.

    Raises:
        UserError: there is no such block.
    """
    asked = range(count) if train.blocks is None else train.blocks
    if any(not -count <= block < count for block in asked):
        raise UserError(
            f"train.blocks = {list(asked)}: the model has {count} blocks, 0 to {count - 1} or "
            f"{-count} to -1"
        )
    return sorted({block % count for block in asked})


@torch.no_grad()
def states_below(model: Any, train: Training, batch: Batch) -> Tensor:
    """Hidden states [n, length, hidden] that the first trained block of a transformers model is
    given, in float32. Neither it nor what comes after is run."""
    assert isinstance(train, LoraTraining | FullTraining), "validated with the entry"
    blocks, taken = stack(model), list[Tensor]()

    def take(block: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0])
        raise _Enough

    first = blocks[places(train, len(blocks))[0]]
    with first.register_forward_pre_hook(take), contextlib.suppress(_Enough):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return taken[0].float()


class _Enough(Exception):
    """What is asked for has been computed."""


def without_prefix(model: Any, train: Training) -> tuple[Any, Training]:
    """The model with what is below its first trained block taken out, called with the states that
    go into that block as ``inputs_embeds``, and what of it is trained, by the blocks' new places.

    Raises:
        UserError: the model has no ``embeddings`` of its own, or too few blocks.
    """
    if not hasattr(model, "embeddings"):
        raise UserError(
            f"prefix: cached serves encoders like BERT; {type(model).__name__} has no 'embeddings'"
        )
    assert isinstance(train, LoraTraining | FullTraining), "validated with the entry"
    found = stack(model)
    chosen = places(train, len(found))
    del found[: chosen[0]]
    model.embeddings = Given()
    return model, train.model_copy(update={"blocks": tuple(p - chosen[0] for p in chosen)})


class Given(nn.Module):
    """In place of embeddings: the states that the batch holds already."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        return inputs_embeds
