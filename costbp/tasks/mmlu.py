"""MMLU: four-way multiple choice in 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300).

The letter is chosen by likelihood or read from what the model writes; both are reported.
"""

from collections.abc import Sequence

from costbp.errors import UserError
from costbp.tasks.base import Example, Row, Task, named, one_of

LETTERS = ("A", "B", "C", "D")


def posed(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, a letter each.

    Raises:
        UserError: there aren't four.
    """
    if len(choices) != len(LETTERS):
        raise UserError(f"{len(choices)} choices instead of {len(LETTERS)}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([question.strip(), *lines])


def example(row: Row) -> Example:
    return Example(posed(str(row["question"]), row["choices"]), named(row["answer"], LETTERS))


TASK = Task(
    example=example,
    columns=("question", "choices", "answer"),
    names=LETTERS,
    instruction="Answer with one letter:",
    parse=one_of(LETTERS),
)
