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

from costbp.config.study import Plan
from costbp.errors import UserError
from costbp.files import atomic
from costbp.models.build import Encoder, features, load_encoder, load_tokenizer
from costbp.tasks.base import SPLITS, Split, read_examples, split

FEATURE_BATCH = 64


@dataclass(frozen=True)
class Prepared:
    """Encoded splits and what is known of them.

    Attributes:
        splits: train, validation, test.
        names: class names.
        facts: counts, majority share, truncated examples, form ("tokens" or "features").
    """

    splits: dict[str, Split]
    names: list[str]
    facts: dict[str, Any]

    @property
    def width(self) -> int:
        """Length of a feature vector; 0 for tokens."""
        values = self.splits["train"].values
        return values.shape[1] if values.dim() == 2 else 0


def prepare(plan: Plan, model: str, task: str) -> Path:
    """Encode a pair's splits unless the cache has them; returns the file."""
    path = plan.prepared(model, task)
    if path.exists():
        return path
    entry, data = plan.catalog.models[model], plan.catalog.tasks[task]
    assets = plan.study.paths.cache / "assets"
    examples = read_examples(data, task, assets)
    tokenizer = load_tokenizer(entry, assets)
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {
        "form": "features" if entry.reads_features else "tokens",
        "names": examples.names,
        "majority": {},
        "examples": {},
        "truncated": {},
    }
    encoder = load_encoder(entry, assets) if entry.reads_features else None
    for name, part in split(examples, data).items():
        rows = tokenizer(part.texts)
        facts["majority"][name] = part.majority
        facts["examples"][name] = len(part)
        facts["truncated"][name] = sum(len(row) > data.max_length for row in rows)
        rows = [_cut(row, data.max_length) for row in rows]
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        ids = torch.tensor([token for row in rows for token in row])
        encoded = Split(ids, torch.tensor(part.labels), offsets)
        if encoder is not None:
            encoded = _with_features(encoder, encoded)
        tensors[f"{name}.values"] = encoded.values
        tensors[f"{name}.labels"] = encoded.labels
        if encoded.offsets is not None:
            tensors[f"{name}.offsets"] = encoded.offsets
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
    return path


def _cut(row: list[int], length: int) -> list[int]:
    """A row of at most ``length`` tokens that keeps its closing token."""
    return row if len(row) <= length else [*row[: length - 1], row[-1]]


def _with_features(encoder: Encoder, tokens: Split) -> Split:
    order = torch.arange(len(tokens))
    if tokens.offsets is not None:
        order = (tokens.offsets[1:] - tokens.offsets[:-1]).argsort(stable=True)
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
            keys = set(stream.keys())
            splits = {
                name: Split(
                    stream.get_tensor(f"{name}.values"),
                    stream.get_tensor(f"{name}.labels"),
                    stream.get_tensor(f"{name}.offsets") if f"{name}.offsets" in keys else None,
                )
                for name in SPLITS
            }
    except Exception as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run again") from error
    return Prepared(splits, facts["names"], facts)
