"""Where a model's weights are, and the transformers model made of them: read from a folder (an
asset's, the hub's, one's own), or drawn at random."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from costbp.config.catalog import ModelEntry
from costbp.config.sources import (
    AssetSource,
    ConfigSource,
    FolderSource,
    PythonSource,
    RandomSource,
    Source,
)
from costbp.console import say
from costbp.device import out_of_memory
from costbp.errors import UserError, first_line
from costbp.models.architecture import REQUIRED, transformers_config
from costbp.models.libraries import with_transformers
from costbp.models.packed import replace_packed
from costbp.models.packed_store import made_once, packed_folder
from costbp.models.tokenizer import Bytes, Hashed, Pretrained, Tokenizer

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout")
CLASSES = {
    "encoder": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "image_text": "AutoModelForImageTextToText",
}


# --- where they are --------------------------------------------------------------------------------


def weights_folder(model: ModelEntry, assets: Path) -> Path:
    """The transformers folder of a model.

    Raises:
        UserError: it has not been fetched, or is not such a folder.
    """
    source = model.base
    if isinstance(source, FolderSource):
        folder, hint = Path(source.path), "check source.path"
    elif isinstance(source, AssetSource):
        folder, hint = assets / source.asset / source.folder, "run `costbp assets`"
        if source.gguf is not None and (folder / source.gguf).is_file():
            return _unpacked(folder, source.gguf)
    else:
        repository = model.repository
        assert repository is not None, "a study with such a model isn't loaded"
        folder, hint = assets / repository.folder, "run `costbp assets`"
    if not (folder / "config.json").is_file():
        raise UserError(f"model '{model.label}': {folder} holds no config.json; {hint}")
    return folder


def configuration(model: ModelEntry, assets: Path) -> dict[str, Any]:
    """The content of a model's ``config.json``: the entry's or its folder's.

    Raises:
        UserError: the folder isn't there, or the file isn't JSON.
    """
    source = model.base
    if source is None:
        return {}
    if isinstance(source, ConfigSource):
        return dict(source.config)
    if isinstance(source, RandomSource):
        return {"model_type": source.model_type, **source.config}
    file = weights_folder(model, assets) / "config.json"
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {first_line(error)}") from error
    return values


def load_tokenizer(model: ModelEntry, assets: Path) -> Tokenizer:
    """The tokenizer that belongs to a model.

    Raises:
        UserError: it can't be read.
    """
    if isinstance(model.source, PythonSource) and model.base is None:
        return Hashed(model.source.vocabulary)
    if isinstance(model.base, RandomSource):
        values = model.base.config
        size = int(values.get("text_config", values)["vocab_size"])
        return Bytes(size) if model.writes_text else Hashed(size)
    return Pretrained(weights_folder(model, assets))


def ready_weights(model: ModelEntry, assets: Path) -> Path:
    """The folder that a base's weights are read from, made first where they are packed here: once, a
    tensor at a time. Not of random weights.

    Raises:
        UserError: see ``load_base``.
    """
    folder, source = weights_folder(model, assets), _base(model)
    if source.bits is None or source.packing == "gptq":
        return folder
    return packed_folder(source, folder, assets, lambda: _read(model, folder, assets, pack=True))


def _unpacked(folder: Path, file: str) -> Path:
    """The model of a GGUF file as a transformers folder in full precision, made once: unpacking
    takes half a minute."""
    target = folder / "unpacked"

    def make(scratch: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {"gguf_file": file, "local_files_only": True}
        try:
            words = AutoTokenizer.from_pretrained(folder, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **options
            )
            if getattr(model, "hf_quantizer", None) is not None:  # it is in full precision now
                model.hf_quantizer.remove_quantization_config(model)
            words.save_pretrained(scratch)
            model.save_pretrained(scratch)
        except ImportError as error:
            raise UserError(
                f"{folder / file}: GGUF files are read with the packages gguf and sentencepiece: "
                "pip install gguf sentencepiece"
            ) from error
        except Exception as error:  # of transformers, gguf, safetensors, or the disk
            raise UserError(f"{folder / file}: can't be unpacked ({first_line(error)})") from error

    with with_transformers():
        return made_once(target, (target / "config.json").is_file, make)


# --- the model of them -----------------------------------------------------------------------------


def load_base(
    model: ModelEntry, assets: Path, classes: int = 0, device: torch.device | str = "cpu"
) -> Any:
    """The base model in its form, packed to four bits if its entry says so.

    Args:
        classes: of the form ``classifier``, whose head is drawn at random.
        device: where it ends. Weights that are read go there one tensor at a time.

    Raises:
        UserError: weights are missing or not readable.
    """
    source = _base(model)
    if not isinstance(source, RandomSource):
        return _read(model, ready_weights(model, assets), assets, classes, device)
    with with_transformers():
        from costbp.models.packed_hooks import packing_of

        config = _config(model, assets, classes)
    torch.manual_seed(source.seed)
    base = randomly_drawn(source, config)
    if (packing := packing_of(source, None)) is not None:
        replace_packed(base, packing.packer())
    return base.to(device)


def randomly_drawn(source: Source, config: Any) -> Any:
    """A transformers model of a configuration, drawn from torch's current seed, on the default
    device, not packed."""
    with with_transformers():
        try:
            return _said(source, _kind(source).from_config(config, **_options(source)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"source.config of a '{config.model_type}' model: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error


def _read(
    model: ModelEntry,
    folder: Path,
    assets: Path,
    classes: int = 0,
    device: torch.device | str = "cpu",
    *,
    pack: bool = False,
) -> Any:
    """The model of a folder's weights. ``pack``: full ones, packed as they are read."""
    with with_transformers():
        from costbp.models.packed_hooks import packing_of

        source, config = _base(model), _config(model, assets, classes)
        options: dict[str, Any] = {"config": config, "local_files_only": True, **_options(source)}
        if torch.device(device).type != "cpu":
            options["device_map"] = {"": device}
        try:
            packing = packing_of(source, getattr(config, "quantization_config", None))
            if pack:
                options["quantization_config"] = packing
            elif packing is not None:
                config.quantization_config = packing.to_dict()
            return _said(source, _kind(source).from_pretrained(folder, **SAFE, **options))
        except UserError as error:
            raise UserError(f"model '{model.label}': {folder}: {error}") from None
        except Exception as error:  # of transformers, safetensors, pickle, or a layer of ours
            if out_of_memory(error):  # a result, not a mistake
                raise
            raise UserError(
                f"model '{model.label}': {folder} can't be loaded ({first_line(error)})"
            ) from error


def _base(model: ModelEntry) -> Source:
    assert model.base is not None, "a Python file without a base has nothing to load"
    return model.base


def _kind(source: Source) -> Any:
    import transformers

    return getattr(transformers, CLASSES[source.form])


def _options(source: Source) -> dict[str, Any]:
    attention = None if source.attention == "sdpa" else source.attention  # None: sdpa, else eager
    return {"attn_implementation": attention, "dtype": getattr(torch, source.dtype)}


def _said(source: Source, model: Any) -> Any:
    """The model; where its attention isn't as asked for, with a notice."""
    if model.config._attn_implementation != source.attention:
        _notice_attention(model.config.model_type, model.config._attn_implementation)
    return model


@functools.cache
def _notice_attention(model_type: str, attention: str) -> None:
    say(f"notice: transformers has no fused attention for '{model_type}' models; it is {attention}")


# weights are safetensors, or a state dict that holds tensors and nothing else
SAFE: dict[str, Any] = {"weights_only": True, "trust_remote_code": False}


def _config(model: ModelEntry, assets: Path, classes: int) -> Any:
    source = _base(model)
    if isinstance(source, RandomSource):
        config = transformers_config(configuration(model, assets), classes)
    else:
        from transformers import AutoConfig

        folder = weights_folder(model, assets)
        extra = {"num_labels": classes} if classes else {}
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **extra)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder / 'config.json'}: {first_line(error)}") from error
        if isinstance(source, ConfigSource):
            _compare(source, config, folder)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.use_cache = False
        for name in DROPOUTS:
            if model.dropout is not None and hasattr(part, name):
                setattr(part, name, model.dropout)
    if source.form == "classifier" and config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(model, assets).pad
    return config


def _compare(source: ConfigSource, config: Any, folder: Path) -> None:
    """Refuse fetched weights of other sizes than the catalog's, which costs are traced with."""
    ours, theirs = source.config.get("text_config", source.config), config.get_text_config()
    for name in REQUIRED:
        if ours[name] != getattr(theirs, name):
            raise UserError(
                f"{folder / 'config.json'}: {name} = {getattr(theirs, name)}, and the catalog's "
                f"models.yaml says {ours[name]}"
            )
