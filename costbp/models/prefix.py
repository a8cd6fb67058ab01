"""The repeated blocks of an encoder: which are trained, and the states that those below put out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import FullTraining, LoraTraining, Training
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
    given, in float32."""
    assert isinstance(train, LoraTraining | FullTraining), "validated with the entry"
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model(**tokens, output_hidden_states=True).hidden_states
    return found[places(train, len(stack(model)))[0]].float()


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
