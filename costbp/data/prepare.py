"""Encoded splits of a (model, task) pair, computed once and cached.

A training job then opens one small file: it needs no tokenizer, and where only the head is
trained no transformers either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from costbp.config.catalog import ModelEntry
from costbp.config.sources import PythonSource, RandomSource
from costbp.console import say, track
from costbp.data.encode import choices, encode
from costbp.data.encoded import Split
from costbp.data.images import image_tokens, pixels_of, store_images
from costbp.data.pairs import Pair
from costbp.data.sources import read_examples
from costbp.data.splits import SPLITS, split
from costbp.errors import UserError
from costbp.files import intact, lock, sealed
from costbp.models.architecture import longest
from costbp.models.modules import Encoder
from costbp.models.prefix import states_below
from costbp.models.weights import configuration, load_base, load_tokenizer, ready_weights
from costbp.tasks.base import Example, load_task

FEATURE_BATCH = 64


@dataclass(frozen=True)
class Prepared:
    """Encoded splits and what is known of them.

    Attributes:
        splits: train, validation, test.
        names: class names; none where answers are free text.
        facts: counts, majority share, truncated examples, form ("tokens", "states" or "features"),
            and ``choices``, the token ids of each name for models that write text.
        words: features of what describes each class [classes, hidden], for a head of label words.
    """

    splits: dict[str, Split]
    names: list[str]
    facts: dict[str, Any]
    words: torch.Tensor | None = None

    @property
    def choices(self) -> list[list[int]]:
        """Token ids of each name, for models that write text."""
        found: list[list[int]] = self.facts.get("choices", [])
        return found

    @property
    def width(self) -> int:
        """Length of a feature vector; 0 for tokens and states."""
        part = self.splits["train"]
        return part.values.shape[1] if part.offsets is None else 0


def prepare(pair: Pair) -> Path:
    """Encode a pair's splits unless the cache has them; returns the file. Weights that are kept
    packed are packed, too.

    Raises:
        UserError: whatever keeps the pair from being trained: a source or column that isn't there,
            longer texts than the model has positions for.
    """
    model, file = pair.model, pair.file
    held = model.base is None or isinstance(model.base, RandomSource) or model.reads == "features"
    if not held:
        ready_weights(model, pair.assets)
    if not intact(file):
        with lock(file.with_name(f".{file.stem}.lock")):  # models of one source share the file
            if not intact(file):
                if file.exists():
                    say(f"warning: {file} is damaged; it is made anew")
                _prepare(pair)
    return file


def _prepare(pair: Pair) -> None:
    model, task, (model_name, task_name), assets, file = pair
    definition = load_task(task.loader)
    pair.check()
    parts = split(read_examples(task, task_name, assets).examples, task, task_name)
    limit = longest(configuration(model, assets))
    if limit is not None:
        limit -= model.virtual
        limit -= model.source.image_positions if isinstance(model.source, PythonSource) else 0
    if limit is not None and task.max_length > limit:
        raise UserError(
            f"task '{task_name}': max_length = {task.max_length}, and model '{model_name}' has "
            f"positions for {limit} tokens; lower it (entries.tasks.{task_name}.max_length in the "
            "study)"
        )
    words = load_tokenizer(model, assets)
    seen = definition.shows_images
    images = image_tokens(model, assets) if seen and model.writes_text else None
    facts: dict[str, Any] = {
        "form": model.reads,
        "names": list(definition.names),
        "pad": words.pad,
        "choices": choices(definition, model, words) if model.writes_text else [],
        "majority": {name: definition.majority(part) for name, part in parts.items()},
        "examples": {name: len(part) for name, part in parts.items()},
        "truncated": {},
        "images": None,
    }
    if seen:
        processor = images.settings if images is not None else None
        facts["images"] = store_images(parts, file, model.source.image_side, processor)
        facts["image_token"] = images.token if images is not None else None
    aligned = model.head == "label_words"
    frozen = model.reads != "tokens" or aligned
    encoder = Encoder(load_base(model, assets)).eval() if frozen else None
    place = {label: index for index, label in enumerate(definition.names)}
    tensors: dict[str, torch.Tensor | None] = {}
    if encoder is not None and aligned:
        said = [task.label_words.get(name, name.replace("_", " ")) for name in definition.names]
        tensors["label_words"] = features(encoder, _tokens(words.rows(said), words.pad))
    for name, part in parts.items():
        encoded = encode(part, model, definition, task.max_length, words, images)
        facts["truncated"][name] = encoded.truncated
        tokens = _tokens(encoded.rows, words.pad)
        told = f"{task_name}: {name} encoded, batches of {FEATURE_BATCH}"
        values, offsets = tokens.values, tokens.offsets
        if encoder is not None and model.reads == "features":
            values, offsets = features(encoder, tokens, told), None
        elif encoder is not None and model.reads == "states":
            values = states(encoder, model, tokens, told)
        tensors |= {
            f"{name}.values": values,
            f"{name}.labels": torch.tensor([place.get(e.answer, -1) for e in part]),
            f"{name}.offsets": offsets,
            f"{name}.starts": torch.tensor(encoded.starts) if encoded.starts else None,
            f"{name}.examples": _packed(part) if name != "train" else None,
        }
    with sealed(file) as temporary:
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, temporary, metadata={"facts": json.dumps(facts)})


def _tokens(rows: Sequence[Sequence[int]], pad: int) -> Split:
    """Rows of token ids, without labels."""
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    ids = torch.tensor([token for row in rows for token in row])
    return Split(ids, torch.zeros(len(rows), dtype=torch.long), offsets, pad=pad)


def states(encoder: Encoder, model: ModelEntry, tokens: Split, told: str) -> torch.Tensor:
    """What the first trained block of an encoder is given of each example, end to end like the
    tokens, [sum of lengths, hidden], in float32."""
    assert tokens.offsets is not None
    found: torch.Tensor | None = None
    for part in track(tokens.order().split(FEATURE_BATCH), told):
        below = states_below(encoder.model, model.train, tokens.batch(part))
        if found is None:
            found = torch.empty(len(tokens.values), below.shape[2])
        for row, index in zip(below, part.tolist(), strict=True):
            start, stop = tokens.offsets[index : index + 2].tolist()
            found[start:stop] = row[: stop - start]
    assert found is not None
    return found


@torch.no_grad()
def features(encoder: Encoder, tokens: Split, told: str = "") -> torch.Tensor:
    """What a frozen encoder hands to a head, of each example, [n, hidden], in float32."""
    order = tokens.order()
    parts = track(order.split(FEATURE_BATCH), told)
    found = torch.cat([encoder(tokens.batch(part)).float() for part in parts])
    values = torch.empty_like(found)
    values[order] = found
    return values


def _packed(examples: list[Example]) -> torch.Tensor:
    """What scoring needs, as bytes of JSON [n]."""
    kept = [[e.answer, list(e.references), e.group] for e in examples]
    return torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> tuple[Example, ...]:
    kept = json.loads(bytes(data.tolist()))
    return tuple(Example("", answer, "", tuple(more), group) for answer, more, group in kept)


def load_prepared(path: Path) -> Prepared:
    """Open a cached pair.

    Raises:
        UserError: it can't be read.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            facts = json.loads(stream.metadata()["facts"])
            found = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            splits = {name: _split(name, found, facts, path) for name in SPLITS}
    except Exception as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run again") from error
    return Prepared(splits, facts["names"], facts, found.get("label_words"))


def _split(name: str, found: dict[str, torch.Tensor], facts: dict[str, Any], path: Path) -> Split:
    packed = found.get(f"{name}.examples")
    return Split(
        found[f"{name}.values"],
        found[f"{name}.labels"],
        found.get(f"{name}.offsets"),
        found.get(f"{name}.starts"),
        facts.get("pad", 0),
        facts.get("image_token"),
        pixels_of(facts["images"], name, path) if facts.get("images") else None,
        _unpacked(packed) if packed is not None else (),
    )
