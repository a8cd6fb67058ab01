"""Disjoint splits that depend on no library's generator and not on the order of reading."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from costbp.config.catalog import HubData, LocalData, Partition, TaskEntry
from costbp.errors import UserError
from costbp.tasks.base import POOL, Example

SPLITS = ("train", "validation", "test")


def distinct(examples: Iterable[Example]) -> list[Example]:
    """Each item once: one that comes back would leak from one split to another. The first answer
    wins where an item has several."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(content(example), example)
    return list(first.values())


def content(example: Example) -> str:
    """What two examples share that are one item."""
    image = example.image.digest if example.image is not None else ""
    return "\n".join(part for part in (example.text, example.context, image) if part)


def split(
    found: Mapping[str, Sequence[Example]], task: TaskEntry, name: str = ""
) -> dict[str, list[Example]]:
    """Train, validation and test splits, of which no two share an item.

    The order behind them is that of SHA-256(seed, what items share): questions on one passage or
    image stay together. What the source has as splits of its own stays apart; a missing validation
    or test split is carved from train.

    Args:
        found: examples by the source's split.

    Raises:
        UserError: too few examples.
    """
    if task.partition is not None:
        return _counted(_skewed(found, task, task.partition), task, name)
    own = _own(found, task, name)
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for ours in ("test", "validation"):  # before train, which yields what they share
        if ours in own:
            given = _ordered(found[own[ours]], task.split_seed, seen)
            parts[ours] = given[: _border(given, getattr(task, ours))]
            seen.update(map(content, parts[ours]))
    kept = {content(e) for ours in ("test", "validation") if ours in own for e in found[own[ours]]}
    rest = _ordered(found[own.get("train", POOL)], task.split_seed, kept)
    for ours in ("test", "validation"):
        if ours not in own:
            border = _border(rest, getattr(task, ours))
            parts[ours], rest = rest[:border], rest[border:]
    parts["train"] = rest
    return _counted(parts, task, name)


def _own(found: Mapping[str, Sequence[Example]], task: TaskEntry, name: str) -> dict[str, str]:
    """Our splits that the source has, under its names; none: all is in one pool."""
    given = task.data.splits if isinstance(task.data, HubData | LocalData) else {}
    if given or set(found) == {POOL}:
        return {str(ours): theirs for ours, theirs in given.items()}
    if "train" not in found:
        raise UserError(
            f"task '{name}': its source has the splits {', '.join(sorted(found))}; say under "
            "data.splits which of them is train"
        )
    return {ours: ours for ours in SPLITS if ours in found}


def _shared(example: Example) -> str:
    """What makes a split see an item's neighbour: its passage or image, or else the item itself."""
    if example.image is not None:
        return example.image.digest
    return example.context or content(example)


def _border(examples: Sequence[Example], size: int) -> int:
    """The first place from ``size`` on where no passage or image is cut in two."""
    while 0 < size < len(examples) and _shared(examples[size - 1]) == _shared(examples[size]):
        size += 1
    return size


def _ordered(examples: Iterable[Example], seed: int, without: set[str]) -> list[Example]:
    def rank(example: Example) -> tuple[bytes, str]:
        shared = hashlib.sha256(f"{seed}:{_shared(example)}".encode()).digest()
        return shared, content(example)

    return sorted((e for e in distinct(examples) if content(e) not in without), key=rank)


def _counted(
    parts: dict[str, list[Example]], task: TaskEntry, name: str
) -> dict[str, list[Example]]:
    """With at most the examples that the entry asks for, and enough of them."""
    if task.train is not None:
        parts["train"] = parts["train"][: task.train]
    if len(parts["train"]) < task.batch_size or not (parts["validation"] and parts["test"]):
        total = sum(len(part) for part in parts.values())
        raise UserError(
            f"task '{name}': {total} examples are too few for {task.validation} validation and "
            f"{task.test} test examples and a batch of {task.batch_size}; lower them in the "
            "catalog's tasks.yaml"
        )
    return parts


def _skewed(
    found: Mapping[str, Sequence[Example]], task: TaskEntry, partition: Partition
) -> dict[str, list[Example]]:
    """One part of a label-skewed partition: of every class the parts get shares drawn from
    Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335)."""
    pool = _ordered((e for part in found.values() for e in part), task.split_seed, set())
    generator = np.random.Generator(np.random.PCG64(task.split_seed))
    mine: list[Example] = []
    for answer in sorted({e.answer for e in pool}):
        same = [e for e in pool if e.answer == answer]
        shares = generator.dirichlet([partition.alpha] * partition.parts)
        edges = np.round(np.cumsum([0.0, *shares]) * len(same)).astype(int)
        mine += same[edges[partition.part] : edges[partition.part + 1]]
    mine = _ordered(mine, task.split_seed, set())
    border = _border(mine, round(partition.test * len(mine)))
    test, rest = mine[:border], mine[border:]
    count = _border(rest, min(task.validation, len(rest) // 2))
    test = test[: _border(test, task.test)]
    return {"test": test, "validation": rest[:count], "train": rest[count:]}
