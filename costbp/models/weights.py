"""Where a model's weights are on this machine, and the transformers model made of them."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from costbp.config.catalog import (
    AssetSource,
    ConfigSource,
    FolderSource,
    FullTraining,
    Held,
    ModelEntry,
    RandomSource,
)
from costbp.device import out_of_memory
from costbp.errors import UserError
from costbp.models.fusion import CELL
from costbp.models.packed_store import kept, packed_folder
from costbp.models.quantised import replace_packed
from costbp.models.tokenizer import Bytes, Hashed, Pretrained, Tokenizer

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout")
CLASSES = {
    "encoder": "AutoModel",
    "fusion": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
    "causal": "AutoModelForCausalLM",
    "image_text": "AutoModelForImageTextToText",
}


def weights_folder(model: ModelEntry, assets: Path) -> Path:
    """The transformers folder of a model.

    Raises:
        UserError: it has not been fetched, or is not such a folder.
    """
    source = model.source
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


def _unpacked(folder: Path, file: str) -> Path:
    """The model of a GGUF file as a transformers folder in full precision, made once: unpacking
    takes half a minute."""
    target = folder / "unpacked"

    def make(scratch: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet()
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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder / file}: can't be unpacked ({reason})") from error

    with without_collection():
        return kept(target, (target / "config.json").is_file, make)


def load_tokenizer(model: ModelEntry, assets: Path) -> Tokenizer:
    """The tokenizer that belongs to a model.

    Raises:
        UserError: it can't be read.
    """
    source = model.source
    if isinstance(source, RandomSource):
        size = int(source.config.get("text_config", source.config)["vocab_size"])
        return Bytes(size) if model.writes_text else Hashed(size)
    return Pretrained(weights_folder(model, assets))


def quiet() -> None:
    """No notes and bars of transformers, nor its warning of a name that peft still asks for."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection while transformers and peft are imported: there is no garbage then, and
    looking for it takes a fifth of the ten seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collection()
def load_base(
    model: ModelEntry, assets: Path, classes: int = 0, device: torch.device | str = "cpu"
) -> nn.Module:
    """The base model in its form; eager attention, since the fused kernel has no forward-mode rule
    and is not seen by the FLOP counter. Packed to four bits if its entry says so.

    Args:
        classes: of the form ``classifier``, whose head is drawn at random.
        device: where it ends. Weights that are read go there one tensor at a time.

    Raises:
        UserError: weights are missing or not readable.
    """
    from costbp.models.packed_hooks import packing_of

    source = model.source
    if source.bits is not None and isinstance(model.train, FullTraining):
        raise UserError(
            f"model '{model.label}': a packed base (source.bits = 4) can't be trained in full; use "
            "train lora"
        )
    if isinstance(source, RandomSource):
        quiet()
        config = _config(model, assets, classes)
        torch.manual_seed(source.seed)
        base: nn.Module = _kind(source).from_config(config, **_held(source))
        if (packing := packing_of(source, None)) is not None:
            replace_packed(base, packing.packer())
        return base.to(device)
    return _read(model, ready_weights(model, assets), assets, classes, device)


@without_collection()
def ready_weights(model: ModelEntry, assets: Path) -> Path:
    """The folder that a base's weights are read from, made first where they are packed here: once, a
    tensor at a time. Not of random weights.

    Raises:
        UserError: see ``load_base``.
    """
    folder, source = weights_folder(model, assets), model.source
    if source.bits is None or source.packing == "gptq":
        return folder
    return packed_folder(source, folder, assets, lambda: _read(model, folder, assets, make=True))


def _read(
    model: ModelEntry,
    folder: Path,
    assets: Path,
    classes: int = 0,
    device: torch.device | str = "cpu",
    *,
    make: bool = False,
) -> Any:
    """The model of a folder's weights. ``make``: full ones, packed as they are read."""
    from costbp.models.packed_hooks import packing_of

    quiet()
    source, config = model.source, _config(model, assets, classes)
    options: dict[str, Any] = {"config": config, "local_files_only": True, **_held(source)}
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    try:
        packing = packing_of(source, getattr(config, "quantization_config", None))
        if make:
            options["quantization_config"] = packing
        elif packing is not None:
            config.quantization_config = packing.to_dict()
        return _kind(source).from_pretrained(folder, **SAFE, **options)
    except UserError as error:
        raise UserError(f"model '{model.label}': {folder}: {error}") from None
    except Exception as error:  # of transformers, safetensors, pickle, or a layer of ours
        if out_of_memory(error):  # a result, not a mistake
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model '{model.label}': {folder} can't be loaded ({reason})") from error


def _kind(source: Held) -> Any:
    import transformers

    return getattr(transformers, CLASSES[source.form])


def _held(source: Held) -> dict[str, Any]:
    return {"attn_implementation": "eager", "dtype": getattr(torch, source.dtype)}


# weights are safetensors, or a state dict that holds tensors and nothing else
SAFE: dict[str, Any] = {"weights_only": True, "trust_remote_code": False}


def _config(model: ModelEntry, assets: Path, classes: int) -> Any:
    from transformers import AutoConfig

    from costbp.models.full_size import transformers_config

    source = model.source
    if isinstance(source, RandomSource):
        config = transformers_config({"model_type": source.model_type, **source.config}, classes)
    else:
        folder = weights_folder(model, assets)
        extra = {"num_labels": classes} if classes else {}
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **extra)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(f"{folder / 'config.json'}: {reason}") from error
        if isinstance(source, ConfigSource):
            _agree(source, config, folder)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.use_cache = False
        for name in DROPOUTS:
            if model.dropout is not None and hasattr(part, name):
                setattr(part, name, model.dropout)
    if source.form == "classifier" and config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(model, assets).pad
    return config


def positions(model: ModelEntry, assets: Path) -> int | None:
    """Tokens that a model has positions for, less those that an image takes in the form ``fusion``;
    None where its configuration doesn't say."""
    source = model.source
    if isinstance(source, RandomSource | ConfigSource):
        values: dict[str, Any] = {"model_type": getattr(source, "model_type", "")} | source.config
    else:
        values = json.loads((weights_folder(model, assets) / "config.json").read_text())
    text = values.get("text_config", values)
    found = text.get("max_position_embeddings")
    if found is None:
        return None
    taken = 2 if values.get("model_type") == "roberta" else 0  # they begin after the padding's
    if source.form == "fusion":
        taken += (source.image_side // CELL) ** 2
    return int(found) - taken


def _agree(source: ConfigSource, config: Any, folder: Path) -> None:
    """The fetched weights are of the architecture that costs are traced of."""
    ours, theirs = source.config.get("text_config", source.config), config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if ours[name] != getattr(theirs, name):
            raise UserError(
                f"{folder / 'config.json'}: {name} = {getattr(theirs, name)}, and the catalog's "
                f"models.yaml says {ours[name]}"
            )


def vision_file(model: ModelEntry, assets: Path) -> Path:
    """The weights of the vision encoder of form ``fusion``.

    Raises:
        UserError: there are none.
    """
    source = model.source
    assert isinstance(source, AssetSource) and source.vision is not None, "checked when loaded"
    found = sorted((assets / source.vision).glob("*.pth"))
    if not found:
        raise UserError(f"model asset '{source.vision}' is not in {assets}; run `costbp assets`")
    return found[0]
