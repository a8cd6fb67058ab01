"""Encoded splits of a (model, task) pair, computed once and cached.

A training job then opens one small file: it needs no tokenizer, and where only the head is
trained no transformers either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from costbp.config.catalog import RandomSource
from costbp.config.study import Plan
from costbp.data.encode import choices, encode
from costbp.data.encoded import Split
from costbp.data.images import image_tokens, pixels_of, processor_settings, store_images
from costbp.data.pairs import check_pair
from costbp.data.sources import read_examples
from costbp.data.splits import SPLITS, split
from costbp.errors import UserError
from costbp.files import atomic, lock
from costbp.models.build import Encoder, features, load_encoder
from costbp.models.weights import load_tokenizer, positions, ready_weights
from costbp.tasks.base import Example, load_task

FEATURE_BATCH = 64


@dataclass(frozen=True)
class Prepared:
    """Encoded splits and what is known of them.

    Attributes:
        splits: train, validation, test.
        names: class names; none where answers are free text.
        facts: counts, majority share, truncated examples, form ("tokens" or "features"), and
            ``choices``, the token ids of each name for models that write text.
    """

    splits: dict[str, Split]
    names: list[str]
    facts: dict[str, Any]

    @property
    def choices(self) -> list[list[int]]:
        """Token ids of each name, for models that write text."""
        found: list[list[int]] = self.facts.get("choices", [])
        return found

    @property
    def width(self) -> int:
        """Length of a feature vector; 0 for tokens."""
        values = self.splits["train"].values
        return values.shape[1] if values.dim() == 2 else 0


def prepare(plan: Plan, model: str, task: str) -> Path:
    """Encode a pair's splits unless the cache has them; returns the file. Weights that are kept
    packed are packed, too.

    Raises:
        UserError: whatever keeps the pair from being trained: a source or column that isn't there,
            longer texts than the model has positions for.
    """
    path, entry = plan.prepared(model, task), plan.catalog.models[model]
    if not (isinstance(entry.source, RandomSource) or entry.reads_features):
        ready_weights(entry, plan.study.paths.cache / "assets")
    if not path.exists():
        with lock(path.with_name(f".{path.stem}.lock")):  # models of one source share the file
            if not path.exists():
                _prepare(plan, model, task, path)
    return path


def _prepare(plan: Plan, model: str, task: str, path: Path) -> None:
    entry, data = plan.catalog.models[model], plan.catalog.tasks[task]
    definition = load_task(data.loader)
    check_pair(plan, model, task)
    assets = plan.study.paths.cache / "assets"
    parts = split(read_examples(data, task, assets), data, task)
    limit = positions(entry, assets)
    if limit is not None and data.max_length > limit:
        raise UserError(
            f"task '{task}': max_length = {data.max_length}, and model '{model}' has positions for "
            f"{limit} tokens; lower it (entries.tasks.{task}.max_length in the study)"
        )
    words = load_tokenizer(entry, assets)
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {
        "form": "features" if entry.reads_features else "tokens",
        "names": list(definition.names),
        "pad": words.pad,
        "choices": choices(definition, entry, words) if entry.writes_text else [],
        "majority": {},
        "examples": {},
        "truncated": {},
        "images": None,
    }
    seen = definition.shows_images
    images = image_tokens(entry, assets) if seen and entry.writes_text else None
    if seen:
        processor = processor_settings(entry, assets) if entry.writes_text else None
        facts["images"] = store_images(parts, path, entry.source.image_side, processor)
        facts["image_token"] = images.token if images is not None else None
    encoder = load_encoder(entry, assets) if entry.reads_features else None
    for name, part in parts.items():
        encoded = encode(part, entry, definition, data.max_length, words, images)
        facts["majority"][name] = definition.majority(part)
        facts["examples"][name] = len(part)
        facts["truncated"][name] = encoded.truncated
        offsets = torch.tensor([0, *(len(row) for row in encoded.rows)]).cumsum(0)
        ids = torch.tensor([token for row in encoded.rows for token in row])
        place = {label: index for index, label in enumerate(definition.names)}
        labels = torch.tensor([place.get(e.answer, -1) for e in part])
        one = Split(ids, labels, offsets, pad=words.pad)
        if encoder is not None:
            one = _with_features(encoder, one)
        tensors[f"{name}.values"] = one.values
        tensors[f"{name}.labels"] = one.labels
        if one.offsets is not None:
            tensors[f"{name}.offsets"] = one.offsets
        if encoded.starts:
            tensors[f"{name}.starts"] = torch.tensor(encoded.starts)
        if name != "train":
            tensors[f"{name}.examples"] = _packed(part)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})


def _packed(examples: list[Example]) -> torch.Tensor:
    """What scoring needs, as bytes of JSON [n]."""
    kept = [[e.answer, list(e.references), e.group] for e in examples]
    return torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> tuple[Example, ...]:
    kept = json.loads(bytes(data.tolist()))
    return tuple(Example("", answer, "", tuple(more), group) for answer, more, group in kept)


def _with_features(encoder: Encoder, tokens: Split) -> Split:
    order = tokens.order()
    found = torch.cat(
        [features(encoder, tokens.batch(part)) for part in order.split(FEATURE_BATCH)]
    )
    values = torch.empty_like(found)
    values[order] = found
    return Split(values, tokens.labels)


def load_prepared(path: Path) -> Prepared:
    """Open a cached pair.

    Raises:
        UserError: the file is not there or not readable.
    """
    if not path.exists():
        raise UserError(f"{path}: not prepared yet; run `costbp prepare` for this model and task")
    try:
        with safe_open(path, framework="pt") as stream:
            facts = json.loads(stream.metadata()["facts"])
            found = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
            splits = {name: _split(name, found, facts, path) for name in SPLITS}
    except Exception as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run again") from error
    return Prepared(splits, facts["names"], facts)


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
