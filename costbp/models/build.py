"""From a catalog entry to a module whose trainable parameters are exactly those to be trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from costbp.config.catalog import ModelEntry
from costbp.config.sources import ConfigSource, Form, PythonSource
from costbp.config.trainables import FullTraining, LoraTraining, Training
from costbp.console import say
from costbp.errors import UserError
from costbp.models.architecture import transformers_config
from costbp.models.libraries import with_transformers
from costbp.models.loss import ChunkedLoss, cross_entropy
from costbp.models.modules import Classifier, Encoder, Head, LabelWords, Transformer, redraw
from costbp.models.packed import QuantisedLinear, replace_packed
from costbp.models.prefix import without_prefix
from costbp.models.trainable import HEADS, head_name, linears, trainable
from costbp.models.weights import load_base, randomly_drawn
from costbp.objective import Objective


def build_model(
    model: ModelEntry,
    classes: int,
    assets: Path,
    seed: int,
    width: int,
    device: torch.device | str = "cpu",
    words: Tensor | None = None,
) -> nn.Module:
    """The module to be trained, in training mode, with its weights; adapters and head are drawn from
    ``seed``, on the CPU whatever the device.

    Args:
        classes: 0 where answers are free text.
        assets: the folder of what has been fetched.
        width: length of a cached feature vector; 0 where the model reads tokens.
        device: where all of it ends.
        words: features of the classes' descriptions [classes, hidden], for a head of label words.

    Raises:
        UserError: weights are missing or not readable, or there are fewer blocks than trained ones.
    """
    if width:
        torch.manual_seed(seed)
        return Head(width, classes).train().to(device)
    if isinstance(model.source, PythonSource):
        return _of_a_file(model, model.source, classes, assets, seed).train().to(device)
    form = model.source.form
    base = load_base(model, assets, classes if form == "classifier" else 0, device)
    torch.manual_seed(seed)
    if form == "classifier":
        redraw(getattr(base, head_name(base)))
    train = model.train
    if model.reads == "states":
        base, train = without_prefix(base, train)
    head = LabelWords(words) if words is not None and model.head == "label_words" else None
    return finished(base, form, train, classes, head=head).train().to(device)


def _of_a_file(
    model: ModelEntry, source: PythonSource, classes: int, assets: Path, seed: int
) -> nn.Module:
    """What the function of a Python file returns, made on the CPU."""
    folders = {name: assets / name for name in source.assets}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"model asset '{name}' is not in {assets}; run `costbp assets`")
    base = None if source.base is None else load_base(model, assets)
    torch.manual_seed(seed)
    context = {"base": base, "classes": classes, "train": model.train, "assets": folders}
    made = source.call(nn.Module, **context)
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise UserError(
            f"{source.file}: {source.function}() returns a module with nothing to train"
        )
    return made


def build_from_config(
    source: ConfigSource,
    train: Training,
    classes: int = 4,
    *,
    adapters_at_zero: bool = True,
) -> Objective:
    """The objective of a configuration's model, in training mode, all of it random, made on the
    current default device (meta, too).

    Args:
        classes: of a classifier.
        adapters_at_zero: start LoRA's second factor at zero, as in training.

    Raises:
        UserError: the model can't be made, or not with the source's ``bits`` or ``loss_chunk``.
    """
    config = transformers_config(source.config, classes)
    if source.form == "classifier" and config.pad_token_id is None:
        config.pad_token_id = 0  # a decoder's classifier reads the last token before padding
    base = randomly_drawn(source, config)
    if source.bits is not None:  # whatever the packing: all take about as many bytes
        replace_packed(base, partial(QuantisedLinear, group=source.group))
    made = finished(base, source.form, train, classes, adapters_at_zero)
    if source.loss_chunk is not None:
        whole: Any = made.model
        if isinstance(train, LoraTraining):
            whole = whole.get_base_model()
        _refuse_changed_logits(whole.config.get_text_config())
        parts = whole.base_model, whole.get_output_embeddings()
        made = ChunkedLoss(*parts, source.loss_chunk, config.get_text_config().vocab_size)
    return Objective(made.train(), cross_entropy)


def queries_and_values(source: ConfigSource) -> list[str]:
    """What a configuration's model calls the linear layers of queries and values: as peft's table
    says of its type, or as the table says of another type and the model has; else all linear layers."""
    with with_transformers():
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known
    kind = source.config["model_type"]
    if isinstance(known.get(kind), list):
        return list(known[kind])
    config = transformers_config(source.config)
    with torch.device("meta"):
        names = linears(randomly_drawn(source, config))
    tables = [*(names for names in known.values() if isinstance(names, list)), ["q_lin", "v_lin"]]
    for targets in sorted(tables, key=len, reverse=True):
        if set(targets) <= set(names) and len(targets) < 3:
            return list(targets)
    rest = [name for name in names if name not in HEADS]
    say(f"notice: no adapters are known for a '{kind}' model; they go to {', '.join(rest)}")
    return rest


def _refuse_changed_logits(config: Any) -> None:
    for name, value in config.to_dict().items():
        if "logit" in name and type(value) in (int, float) and value != 1:
            raise UserError(
                f"source.loss_chunk: a '{config.model_type}' model changes what its head puts out "
                f"({name} = {value}): leave loss_chunk out"
            )


def finished(
    base: Any,
    form: Form,
    train: Training,
    classes: int,
    adapters_at_zero: bool = True,
    head: nn.Module | None = None,
) -> nn.Module:
    """A transformers model with what is trained put in, as its form puts out."""
    vocabulary = base.config.get_text_config().vocab_size if form in ("causal", "image_text") else 0
    if isinstance(train, FullTraining) and form == "encoder" and getattr(base, "pooler", None):
        base.pooler.requires_grad_(False)  # its output is not read
    adapted = trainable(base, form, train, adapters_at_zero=adapters_at_zero)
    if form == "encoder":
        return Classifier(Encoder(adapted), classes, head)
    return Transformer(adapted, vocabulary)
