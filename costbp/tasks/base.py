"""Examples, fixed splits, and prepared data as the loop reads it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from costbp.config.catalog import TaskEntry
from costbp.errors import UserError
from costbp.objective import Batch

SPLITS = ("train", "validation", "test")
PAD_TO = 8  # padded lengths are multiples of this, so that few shapes occur


@dataclass(frozen=True)
class Examples:
    """Labelled texts. ``labels`` index ``names``."""

    texts: list[str]
    labels: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at ``indices``, in that order."""
        return Examples(
            [self.texts[i] for i in indices], [self.labels[i] for i in indices], self.names
        )

    @property
    def majority(self) -> float:
        """Share of the most frequent class: what a constant answer scores."""
        return Counter(self.labels).most_common(1)[0][1] / len(self.labels)


def distinct(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> Examples:
    """Examples from (text, label name) pairs, each text once: a text that comes back would leak
    from one split to another. The first label wins where a text has several."""
    first = dict(reversed(pairs))
    texts = list(dict.fromkeys(text for text, _ in pairs))
    return Examples(texts, [names.index(first[text]) for text in texts], list(names))


def read_examples(task: TaskEntry, name: str, assets: Path) -> Examples:
    """All distinct examples of a task, from its loader module.

    Args:
        assets: folder that holds the fetched assets, one folder each.

    Raises:
        UserError: the task has too few examples for its splits, or its files are not there.
    """
    loader = import_module(f"costbp.tasks.{task.loader}")
    folder = assets / task.asset if task.asset else assets
    if task.asset and not folder.is_dir():
        raise UserError(
            f"task '{name}': asset '{task.asset}' is not in {assets}; run `costbp assets`"
        )
    examples: Examples = loader.read(folder)
    if len(examples) <= task.validation + task.test + task.batch_size:
        raise UserError(
            f"task '{name}': {len(examples)} examples are too few for {task.validation} validation "
            f"and {task.test} test examples; lower them in the catalog's tasks.yaml"
        )
    return examples


def split(examples: Examples, task: TaskEntry) -> dict[str, Examples]:
    """Disjoint train, validation and test splits.

    The order behind them is that of SHA-256(seed, text): it depends on no library's generator and
    not on the order in which examples were read.
    """

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{task.split_seed}:{examples.texts[index]}".encode()).digest()

    order = sorted(range(len(examples)), key=rank)
    first, second = task.test, task.test + task.validation
    parts = {"test": order[:first], "validation": order[first:second], "train": order[second:]}
    return {name: examples.take(parts[name]) for name in SPLITS}


@dataclass(frozen=True)
class Split:
    """Encoded examples of one split: token ids of differing lengths, or feature vectors.

    Attributes:
        values: token ids, all examples end to end, [sum of lengths]; or features, [n, hidden].
        labels: [n].
        offsets: where each example starts in ``values``, [n + 1]; None for features.
    """

    values: Tensor
    labels: Tensor
    offsets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Batch:
        """The examples at ``indices`` as one batch: ``features`` [n, hidden], or ``input_ids``
        and ``attention_mask`` [n, length] padded to a multiple of 8; and ``labels`` [n]."""
        labels = self.labels[indices]
        if self.offsets is None:
            return {"features": self.values[indices], "labels": labels}
        rows = [self.values[self.offsets[i] : self.offsets[i + 1]] for i in indices.tolist()]
        length = -(-max(len(row) for row in rows) // PAD_TO) * PAD_TO
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """All examples once, similar lengths together, for evaluation."""
        order = torch.arange(len(self))
        if self.offsets is not None:
            order = (self.offsets[1:] - self.offsets[:-1]).argsort(stable=True)
        for part in order.split(batch_size):
            yield self.batch(part)
