"""What a task is: rows become examples, and answers are scored.

A task module defines ``TASK``. Where its rows come from (a hub, a file, a package) is the catalog's
business, what a model makes of an example (a class, or text) the model's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from costbp.config.loaders import Classification, TaskFile
from costbp.errors import UserError

Row = Mapping[str, Any]
Rows = Callable[[Path], Iterable[tuple[str, Row]]]
Metrics = dict[str, float]
POOL = ""  # name of the split of a source that has one only


@dataclass(frozen=True)
class EncodedImage:
    """An image file (PNG, JPEG) whose bytes are read when asked for, and not kept.

    Attributes:
        digest: SHA-256 of the bytes in hex; images are equal by it.
        read: gives the bytes.
    """

    digest: str
    read: Callable[[], bytes] = field(repr=False, compare=False)


def encoded_image(value: Any) -> EncodedImage:
    """The image of a row's value: bytes, a path, ``{bytes, path}`` of ``datasets``, or a function
    that gives one of these.

    Raises:
        UserError: no such file, or not an image.
    """
    read = partial(_bytes, value)
    return EncodedImage(hashlib.sha256(read()).hexdigest(), read)


def _bytes(value: Any) -> bytes:
    if callable(value):
        value = value()
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path):
        try:
            value = Path(value).read_bytes()
        except OSError as error:
            raise UserError(f"image {value}: {error.strerror}") from None
    if not isinstance(value, bytes) or not value:
        raise UserError("no image")
    return value


@dataclass(frozen=True)
class Example:
    """One item.

    Attributes:
        text: the question or text; a classifier reads it as it is, a language model with the
            task's ``instruction`` after it.
        answer: what the model is to put out: one of the task's ``names``, or text.
        context: what comes with the text and is cut first where both are too long.
        references: further answers that count (the ten annotators of VQA).
        group: items that some metrics judge together (all answers to one question).
        image: what is asked about.
    """

    text: str
    answer: str
    context: str = ""
    references: tuple[str, ...] = ()
    group: str = ""
    image: EncodedImage | None = field(default=None, repr=False)


def accuracy(
    examples: Sequence[Example], given: Sequence[str], read: Callable[[str], str] = str
) -> Metrics:
    """Share of answers that equal the example's, of which ``read`` takes what counts."""
    right = sum(read(e.answer) == answer for e, answer in zip(examples, given, strict=True))
    return {"accuracy": right / len(examples)}


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Reads the first of ``names`` that a text says as a word: ``(b)``, ``The answer is B.`` and
    ``B`` are ``B``. Of letters a capital goes before a small one, which may be an article. Empty
    where there is none."""
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    exact = re.compile(rf"(?<!\w)({words})(?!\w)")
    loose = re.compile(exact.pattern, re.IGNORECASE)
    places = {name.lower(): name for name in names}
    letters = all(len(name) == 1 for name in names)

    def parse(text: str) -> str:
        found = (exact.search(text) if letters else None) or loose.search(text)
        return places[found[1].lower()] if found else ""

    return parse


@dataclass(frozen=True)
class Task:
    """How rows of one benchmark become examples, and how answers are scored.

    Attributes:
        example: a row's example.
        columns: what a row must have.
        names: the closed set of answers; none: free text.
        rows: reads (split, row) pairs from an asset's folder, or from installed packages; None
            where the rows come from a hub or file.
        instruction: what a language model is told after the text.
        parse: a generated text's answer.
        score: (examples, answers) to metrics; the first is the main one, called accuracy.
        new_tokens: most tokens of a generated answer.
    """

    example: Callable[[Row], Example]
    columns: tuple[str, ...]
    names: tuple[str, ...] = ()
    rows: Rows | None = None
    instruction: str = ""
    parse: Callable[[str], str] = str.strip
    score: Callable[[Sequence[Example], Sequence[str]], Metrics] = accuracy
    new_tokens: int = 8

    @property
    def shows_images(self) -> bool:
        """Whether its rows have images."""
        return "image" in self.columns

    def majority(self, examples: Sequence[Example]) -> float:
        """What the commonest answer, given to every example, scores on the main metric."""
        answers = (e.answer if self.names else self.parse(e.answer) for e in examples)
        common = Counter(answers).most_common(1)[0][0]
        return self.score(examples, [common] * len(examples))["accuracy"]


def text_task(
    names: tuple[str, ...],
    instruction: str,
    rows: Rows | None = None,
    read: Callable[[Any], str] | None = None,
) -> Task:
    """A task whose rows hold a ``text`` and a ``label`` of ``names``, or which ``read`` reads."""

    def example(row: Row) -> Example:
        label, text = row["label"], "" if row["text"] is None else str(row["text"])
        return Example(" ".join(text.split()), read(label) if read else named(label, names))

    return Task(example, ("text", "label"), names, rows, instruction)


def labels_of(said: Classification) -> Callable[[Any], str]:
    """What gives the class that a label means, of labels that are all of one type."""
    known = said.labels or {name: name for name in said.names}
    kinds: set[type] = set()

    def read(label: Any) -> str:
        kinds.add(type(label))
        name = known.get(str(label).lower() if isinstance(label, bool) else str(label))
        if name is not None and len(kinds) == 1:
            return name
        what = "not known" if name is None else "of another type than those before"
        if label in (None, ""):
            what = "empty"
        raise UserError(f"its label {label!r} is {what}; allowed: {', '.join(known)}")

    return read


def load_task(loader: str | TaskFile | Classification) -> Task:
    """The task of a module in ``costbp/tasks``, of a Python file, or of an entry alone.

    Raises:
        UserError: the file defines no task.
    """
    if isinstance(loader, TaskFile):
        return loader.call(Task)
    if isinstance(loader, Classification):
        asked = loader.instruction or f"One of {', '.join(loader.names)}:"
        return text_task(loader.names, asked, read=labels_of(loader))
    task: Task = import_module(f"costbp.tasks.{loader}").TASK
    return task


def named(value: Any, names: Sequence[str]) -> str:
    """The class name of a label that is a number, a truth value or the name itself.

    Raises:
        UserError: it is none of those.
    """
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, str) and value.lower() in ("false", "true"):  # a csv's
        value = value.lower() == "true"
    if isinstance(value, bool | int) and 0 <= int(value) < len(names):
        return names[int(value)]
    raise UserError(
        f"label {value!r} is outside the set: {', '.join(names)} (or 0 to {len(names) - 1})"
    )
