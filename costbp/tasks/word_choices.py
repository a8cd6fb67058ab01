"""The word problems as multiple choice: one right number among three near ones."""

import random
from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import POOL, Row, Task, one_of
from costbp.tasks.mmlu import LETTERS, example
from costbp.tasks.word_problems import SEED, problems


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    chance = random.Random(SEED + 1)
    for text, number in problems():
        near = [n for n in range(max(0, number - 9), number + 10) if n != number]
        numbers = [number, *chance.sample(near, len(LETTERS) - 1)]
        chance.shuffle(numbers)
        choices = [str(n) for n in numbers]
        yield POOL, {"question": text, "choices": choices, "answer": numbers.index(number)}


TASK = Task(
    example=example,
    columns=("question", "choices", "answer"),
    names=LETTERS,
    rows=rows,
    instruction="Answer with one letter:",
    parse=one_of(LETTERS),
)
