"""Which part of a transformers model is trained, and the model as an objective calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from costbp.config.catalog import FullTraining, HeadTraining, Training
from costbp.config.sources import Form
from costbp.errors import UserError
from costbp.models.libraries import with_transformers
from costbp.models.prefix import places, stack

HEADS = (
    "classifier",
    "score",
    "lm_head",
    "embed_out",
)  # trained in full beside adapters, never packed


def linears(model: nn.Module) -> list[str]:
    """What a model calls its linear layers inside their modules, each name once."""
    with with_transformers():
        from transformers.pytorch_utils import Conv1D
    named = model.named_modules()
    found = (name.split(".")[-1] for name, m in named if isinstance(m, nn.Linear | Conv1D))
    return list(dict.fromkeys(found))


def head_name(model: nn.Module) -> str:
    """Name of the head that a transformers model has; "" where it has none."""
    return next((name for name in HEADS if hasattr(model, name)), "")


def trainable(
    model: Any, form: Form, train: Training, *, adapters_at_zero: bool = True
) -> nn.Module:
    """The model with ``requires_grad`` on what its entry trains, adapters put in.

    Trained adapters and heads are float32 whatever the base's dtype is, as peft keeps them.

    Args:
        form: as in the catalog; a classifier's head is trained beside adapters. A base without a
            head of its own is frozen whole: ours comes on top.
        adapters_at_zero: start LoRA's second factor at zero, as in training.

    Raises:
        UserError: no layer is called as the adapters' targets.
    """
    if isinstance(train, FullTraining) and train.blocks is None:
        return model
    model.requires_grad_(False)
    if isinstance(train, FullTraining):
        found = stack(model)
        for place in places(train, len(found)):
            found[place].requires_grad_(True)
        return model
    head = head_name(model)
    if isinstance(train, HeadTraining):
        output = model.get_output_embeddings()
        if form == "classifier":
            getattr(model, head).requires_grad_(True)
        elif output is not None:  # untied from the embedding, which stays frozen
            output.weight = nn.Parameter(output.weight.detach().clone())
        return _in_float32(model)
    targets = list(train.targets)
    with with_transformers():
        from peft import LoraConfig, get_peft_model

        chosen = None if train.blocks is None else places(train, len(stack(model)))
        settings = LoraConfig(
            layers_to_transform=chosen,
            r=train.rank,
            lora_alpha=train.alpha,  # type: ignore[arg-type]
            lora_dropout=train.dropout,
            target_modules=targets,
            modules_to_save=[head] if form == "classifier" else None,
            init_lora_weights=adapters_at_zero,
        )
        try:
            return _in_float32(get_peft_model(model, settings))
        except ValueError as error:
            name = type(model).__name__
            raise UserError(
                f"train.targets = {targets} match no layer of {name}, whose linear layers are "
                f"called {', '.join(linears(model))}"
            ) from error


def _in_float32(model: nn.Module) -> nn.Module:
    """Trained parameters in float32; a head that is trained gets its input in float32, too."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        for parameter in own:
            if parameter.dtype != torch.float32 and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if own and type(module) is nn.Linear:
            module.register_forward_pre_hook(_cast_input)
    return model


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = module.weight
    return (inputs[0].to(weight.dtype), *inputs[1:])
