"""Which part of a transformers model is trained, and the model as an objective calls it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from costbp.config.sources import Form
from costbp.config.trainables import (
    FullTraining,
    HeadTraining,
    LoraTraining,
    NormTraining,
    Training,
    VirtualTokens,
)
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

    What is trained is float32 whatever the base's dtype is, as peft keeps adapters.

    Args:
        form: as in the catalog; a classifier's head is trained beside adapters. A base without a
            head of its own is frozen whole: ours comes on top.
        adapters_at_zero: start LoRA's second factor at zero, as in training.

    Raises:
        UserError: no layer is called as the adapters' targets or what is trained beside them.
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
    if isinstance(train, NormTraining):
        norms = [module for module in model.modules() if _is_norm(module)]
        for module in [*norms, *([getattr(model, head)] if form == "classifier" else [])]:
            module.requires_grad_(True)
        if not norms:
            raise UserError(f"train.kind = norms: {type(model).__name__} has no norms")
        return _in_float32(model)
    if isinstance(train, VirtualTokens):
        return _with_tokens(model, train)
    return _adapted(model, train, head if form == "classifier" else "", adapters_at_zero)


def _adapted(model: Any, train: LoraTraining, head: str, at_zero: bool) -> nn.Module:
    name, targets = type(model).__name__, list(train.targets)
    with with_transformers():
        from peft import LoraConfig, get_peft_model

        chosen = None if train.blocks is None else places(train, len(stack(model)))
        full = list(dict.fromkeys([*([head] if head else []), *train.beside]))
        settings = LoraConfig(
            layers_to_transform=chosen,
            r=train.rank,
            lora_alpha=train.alpha,  # type: ignore[arg-type]
            lora_dropout=train.dropout,
            target_modules=targets,
            modules_to_save=full or None,
            init_lora_weights=at_zero,
            use_dora=train.dora,
        )
        try:
            made = get_peft_model(model, settings)
        except ValueError as error:
            raise UserError(
                f"train.targets = {targets} match no layer of {name}, whose linear layers are "
                f"called {', '.join(linears(model))}"
            ) from error
    trained = [f".{place}" for place, p in made.named_parameters() if p.requires_grad]
    for module in train.beside:
        if not any(f".{module}.modules_to_save." in place for place in trained):
            raise UserError(f"train.beside: {name} has no module '{module}' that can be trained")
    return _in_float32(made)


def _with_tokens(model: Any, train: VirtualTokens) -> nn.Module:
    with with_transformers():
        from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

        from costbp.models.prompted import Prompted

        common: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": train.tokens}
        settings: Any = PrefixTuningConfig(**common)
        if train.kind == "prompt":  # better than noise (Lester et al. 2021, section 3.2)
            settings = PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
        return Prompted(_in_float32(get_peft_model(model, settings)))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _in_float32(model: Any) -> Any:
    """Trained parameters in float32; their modules get their input in float32, too, and put out the
    base's dtype, unless they belong to the head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = head_name(base)
    heads = set(getattr(base, head).modules()) if head else set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        given = {p.dtype for p in own if p.is_floating_point()} - {torch.float32}
        for parameter in own:
            if parameter.dtype in given:
                parameter.data = parameter.data.float()
        if own and (type(module) is nn.Linear or _is_norm(module)):
            module.register_forward_pre_hook(_cast_input)
        if given and module not in heads:
            module.register_forward_hook(partial(_cast_output, dtype=given.pop()))
    return model


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    weight: Any = module.weight
    return (inputs[0].to(weight.dtype), *inputs[1:])


def _cast_output(
    module: nn.Module, inputs: tuple[Any, ...], output: Any, dtype: torch.dtype
) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) else output
