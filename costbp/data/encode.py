"""Examples as token ids: what a classifier reads, or a prompt and the answer a model is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from costbp.config.catalog import ModelEntry
from costbp.data.images import ImageTokens
from costbp.errors import UserError
from costbp.models.tokenizer import Tokenizer
from costbp.tasks.base import Example, Task

LEAST = 4  # tokens of a prompt that are kept, however long the answers


class Encoded(NamedTuple):
    """Token ids of each example of a split, where each answer starts (empty for classifiers), and how
    many examples were cut."""

    rows: list[list[int]]
    starts: list[int]
    truncated: int


def encode(
    examples: Sequence[Example],
    model: ModelEntry,
    task: Task,
    limit: int,
    words: Tokenizer,
    images: ImageTokens | None = None,
) -> Encoded:
    """Token ids of at most ``limit`` tokens an example; a context is cut before a text.

    Args:
        images: how a model that writes text is shown an image.

    Raises:
        UserError: the model's tokenizer can't do what its entry asks for.
    """
    if model.writes_text:
        return _prompts(examples, Prompter(model, task, words, images), limit)
    return _texts(examples, limit, words)


def _texts(examples: Sequence[Example], limit: int, words: Tokenizer) -> Encoded:
    texts = [e.text for e in examples]
    paired = any(e.context for e in examples)
    rows = words.rows(texts, [e.context for e in examples] if paired else None)
    truncated = [index for index, row in enumerate(rows) if len(row) > limit]
    for index in truncated:
        row = rows[index]
        if context := examples[index].context:
            kept = words.plain(context)[: limit - len(row)]
            row = words.rows([texts[index]], [words.text(kept)])[0]
        rows[index] = row if len(row) <= limit else [*row[: limit - 1], row[-1]]  # its last closes
    return Encoded(rows, [], len(truncated))


def _prompts(examples: Sequence[Example], prompter: Prompter, limit: int) -> Encoded:
    """What a prompt is cut to doesn't depend on its answer: in a test that would give it away."""
    rows, starts, truncated = [], [], 0
    room = max(LEAST, limit - prompter.reserve(limit))
    for example, prompt in zip(examples, prompter.all(examples), strict=True):
        long = len(prompt) > room
        if long:
            prompt = prompter.shorter(example, len(prompt) - room)
            if example.image is not None and len(prompt) > room:
                raise UserError(
                    f"max_length = {limit}: the image of '{example.text[:40]}' and what belongs to "
                    f"it take {len(prompt)} tokens of {room}; raise it or lower image_side"
                )
        row = [*prompt[:room], *prompter.answer(example.answer)]
        starts.append(min(len(prompt), room))
        truncated += long or len(row) > limit
        rows.append(row[:limit])
    return Encoded(rows, starts, truncated)


@dataclass(frozen=True)
class Prompter:
    """How a model that writes text is asked for a task's answers."""

    model: ModelEntry
    task: Task
    words: Tokenizer
    images: ImageTokens | None = None

    def all(self, examples: Sequence[Example]) -> list[list[int]]:
        """Token ids of each example's prompt."""
        asked = self.task.instruction
        contents = ["\n".join(filter(None, (e.context, e.text, asked))) for e in examples]
        if self.model.source.chat:
            chats = [
                self.words.chat(c, bool(e.image)) for c, e in zip(contents, examples, strict=True)
            ]
            rows = [self.words.plain(chat) for chat in chats]
        else:
            rows = self.words.rows(contents)
            # without the token that would end the text before its answer
            rows = [r[:-1] if len(r) > 1 and r[-1] == self.words.end else r for r in rows]
        if self.images is None:
            return rows
        pairs = zip(rows, examples, strict=True)
        return [self.images.shown(row, e.image) if e.image else row for row, e in pairs]

    def answer(self, answer: str) -> list[int]:
        """Token ids of an answer with the token that ends it."""
        ids = answer_ids(answer, self.words, chat=self.model.source.chat)
        return ids if self.words.end is None else [*ids, self.words.end]

    def reserve(self, limit: int) -> int:
        """Tokens that are kept for answers: those of the longest name or, of free text, what the
        task may write, at most a quarter of all."""
        if self.task.names:
            return max(len(self.answer(name)) for name in self.task.names)
        return min(self.task.new_tokens, limit // 4)

    def shorter(self, example: Example, excess: int) -> list[int]:
        """The prompt with its context, or else its text, cut by ``excess`` tokens; what comes after
        stays, so that the model is still asked for an answer."""
        part = example.context or example.text
        kept = self.words.text(self.words.plain(part)[: -excess or None])
        short = replace(example, context=kept) if example.context else replace(example, text=kept)
        return self.all([short])[0]


def answer_ids(answer: str, words: Tokenizer, *, chat: bool) -> list[int]:
    """Token ids of an answer as it continues a prompt: after a blank, or at a chat turn's start."""
    return words.plain(answer if chat else f" {answer}")


def choices(task: Task, model: ModelEntry, words: Tokenizer) -> list[list[int]]:
    """Token ids of each of a task's answers, no two alike.

    Raises:
        UserError: two answers are encoded alike.
    """
    found = [answer_ids(name, words, chat=model.source.chat) for name in task.names]
    if len(set(map(tuple, found))) < len(found):
        raise UserError(f"the answers {', '.join(task.names)} are encoded alike by this tokenizer")
    return found
