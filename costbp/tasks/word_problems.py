"""Arithmetic word problems by a seeded generator: two or three steps, the answer a number.

Ours, for trying generation where nothing can be downloaded; no benchmark. `word_choices` poses the
same problems as multiple choice.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from costbp.tasks.base import POOL, Example, Row, Task
from costbp.tasks.gsm8k import TASK as GSM8K

COUNT, SEED = 4000, 0
PEOPLE = ("Ada", "Ben", "Chen", "Dara", "Emil", "Fatou", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "marbles", "stamps", "shells", "coins", "pencils", "stickers")
STARTS = (
    ("{who} has {a} {what}.", lambda a, b: a),
    ("{who} has {b} boxes with {a} {what} each.", lambda a, b: a * b),
    ("{who} has {a} {what} and finds {b} more.", lambda a, b: a + b),
)
TURNS = (
    ("{other} brings {c} more.", lambda n, c: n + c),
    ("{who} gives {c} of them to {other}.", lambda n, c: n - c),
    ("Then {who} gets as many again {c} times.", lambda n, c: n * (1 + c)),
)


def problems() -> Iterator[tuple[str, int]]:
    """Problem and answer, the same ones in the same order each time."""
    chance = random.Random(SEED)
    for _ in range(COUNT):
        who, other = chance.sample(PEOPLE, 2)
        what, (a, b) = chance.choice(THINGS), (chance.randint(3, 20), chance.randint(2, 9))
        start, count = chance.choice(STARTS)
        lines, number = [start.format(who=who, what=what, a=a, b=b)], count(a, b)
        for turn, change in chance.sample(TURNS, chance.randint(1, 2)):
            c = chance.randint(1, min(9, number - 1)) if "gives" in turn else chance.randint(2, 4)
            lines.append(turn.format(who=who, other=other, c=c))
            number = change(number, c)
        yield " ".join([*lines, f"How many {what} does {who} have now?"]), number


def rows(folder: Path) -> Iterator[tuple[str, Row]]:
    for text, number in problems():
        yield POOL, {"question": text, "answer": str(number)}


def example(row: Row) -> Example:
    return Example(str(row["question"]), str(row["answer"]))


TASK = Task(
    example=example,
    columns=("question", "answer"),
    rows=rows,
    instruction="Answer with the number:",
    parse=GSM8K.parse,
    score=GSM8K.score,
    new_tokens=12,
)
